"""
A network of minnow as a class of transformers. `hub.py export --as=custom` puts this file and model.py beside
the weights; then AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True) works.
"""
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .model import ModelConfig, make_model, rotary_table


class MinnowConfig(PretrainedConfig):
    model_type = 'minnow'

    def __init__(self, minnow=None, **more):
        self.minnow = minnow or {}  # the fields of the ModelConfig
        self.num_hidden_layers = self.minnow.get('n_layer', 0)  # generate() asks for it
        super().__init__(**more)


class MinnowForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = MinnowConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = make_model(ModelConfig(**config.minnow))
        self.post_init()

    def _init_weights(self, module):
        """
        Fill the buffers that are in no file: the rotary table and the loads of experts. The weights are
        loaded.
        """
        if getattr(module, 'load', None) is not None:
            module.load.zero_()
        if getattr(module, 'rotary', None) is not None:
            cfg = module.cfg
            module.rotary.copy_(rotary_table(cfg.block_size, cfg.d_head, cfg.rope_theta))

    def get_input_embeddings(self):
        return self.model.wte

    def forward(self, input_ids, attention_mask=None, labels=None, **unused):
        """
        input_ids (B, T) → logits (B, T, vocab_size) in float32; with labels (B, T) the mean loss of the next
        tokens too, without labels below zero. Padding may stand at the end of a row. Raises ValueError for
        more tokens than block_size, and for padding before text, which the network would read.
        """
        if attention_mask is not None and (attention_mask[:, :-1] < attention_mask[:, 1:]).any():
            raise ValueError('attention_mask: this network reads padding before text: pad on the right, '
                             'or give texts of one length at a time')
        loss = None
        if labels is not None:
            loss = self.model(input_ids[:, :-1], labels[:, 1:].clamp(min=-1))
        return CausalLMOutput(loss=loss, logits=self.model(input_ids))

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **unused):
        """No cache: for each new token the network reads the last block_size tokens again."""
        size = self.model.cfg.block_size
        inputs = {'input_ids': input_ids[:, -size:], 'attention_mask': None}
        if attention_mask is not None:
            inputs['attention_mask'] = attention_mask[:, -size:]
        return inputs

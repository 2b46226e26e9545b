"""
A class of transformers for minnow's models, for those that no existing class fits. `hub.py export
--as=custom` writes this file, model.py and the other files that the model needs into the folder with the
weights. Then AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True) works.
"""
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .model import ModelConfig, make_model, rotary_table


class MinnowConfig(PretrainedConfig):
    model_type = 'minnow'

    def __init__(self, minnow=None, **more):
        self.minnow = minnow or {}  # the ModelConfig
        self.num_hidden_layers = self.minnow.get('n_layer', 0)  # what generate() asks for
        super().__init__(**more)


class MinnowForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = MinnowConfig

    def __init__(self, config):
        super().__init__(config)
        settings = ModelConfig
        if config.minnow.get('n_expert'):  # moe
            from features.moe.settings import MoEConfig  # moe
            settings = MoEConfig  # moe
        self.model = make_model(settings(**config.minnow))
        self.post_init()

    def _init_weights(self, module):
        """Weights are loaded; the rotary table and the experts' loads are not stored in files."""
        if getattr(module, 'load', None) is not None:
            module.load.zero_()
        if getattr(module, 'rotary', None) is not None:
            cfg = module.cfg
            module.rotary.copy_(rotary_table(cfg.block_size, cfg.d_head, cfg.rope_theta, cfg.rope_scaling))

    def get_input_embeddings(self):
        return self.model.wte

    def forward(self, input_ids, attention_mask=None, labels=None, **unused):
        """
        input_ids (B, T) → logits (B, T, vocab_size) in float32; labels (B, T): the mean next-token loss,
        ignoring labels below zero. A row may be padded at its end. Raises ValueError for more tokens than
        block_size, and for padding before text, which the model would read.
        """
        if attention_mask is not None and (attention_mask[:, :-1] < attention_mask[:, 1:]).any():
            raise ValueError("attention_mask: this network reads padding before text: pad on the right, "
                             "or give texts of one length at a time")
        loss = self.model(input_ids[:, :-1], labels[:, 1:].clamp(min=-1)) if labels is not None else None
        return CausalLMOutput(loss=loss, logits=self.model(input_ids))

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **unused):
        """No cache: each step reads the last block_size tokens again."""
        size = self.model.cfg.block_size
        return {'input_ids': input_ids[:, -size:],
                'attention_mask': None if attention_mask is None else attention_mask[:, -size:]}

"""
A class of transformers for minnow's models, for those that no existing class fits. `hub.py export
--as=custom` writes this file, model.py and the other files that the model needs into the folder with the
weights. Then AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True) works.
"""
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .model import ModelConfig, make_model


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
        """Weights are loaded; the rotary tables and the experts' loads are not stored in files."""
        if getattr(module, 'load', None) is not None:
            module.load.zero_()
        if hasattr(module, 'rotary_tables'):
            for name, table in module.rotary_tables().items():
                if table is not None:
                    getattr(module, name).copy_(table)

    def get_input_embeddings(self):
        return self.model.wte

    def forward(self, input_ids, attention_mask=None, labels=None, **unused):
        """
        input_ids (B, T) → logits (B, T, vocab_size) in float32; labels (B, T): the mean next-token loss,
        ignoring labels below zero. attention_mask (B, T): 0 for padding, anywhere in a row; no token sees it,
        and positions are counted without it. Raises ValueError for more tokens than block_size, and for a
        mask of another shape.
        """
        order, is_text = padding_first(input_ids, attention_mask)
        if order is not None:
            input_ids = input_ids.gather(1, order)
        loss = None
        if labels is not None:
            pieces = None
            if order is not None:  # padding predicts nothing
                pieces = is_text[:, :-1].contiguous()
                labels = labels.gather(1, order).masked_fill(is_text.roll(1, dims=1) == 0, -1)
            loss = self.model(input_ids[:, :-1], labels[:, 1:].clamp(min=-1), pieces=pieces)
        logits = self.model(input_ids, pieces=is_text)
        if order is not None:
            logits = logits.gather(1, order.argsort(dim=1).unsqueeze(2).expand_as(logits))
        return CausalLMOutput(loss=loss, logits=logits)

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **unused):
        """
        No cache: each step reads the last block_size tokens again. The next token is the one after the last,
        so padding moves to the front.
        """
        order, is_text = padding_first(input_ids, attention_mask)
        if order is not None:
            input_ids, attention_mask = input_ids.gather(1, order), is_text
        size = self.model.cfg.block_size
        return {'input_ids': input_ids[:, -size:],
                'attention_mask': None if attention_mask is None else attention_mask[:, -size:]}


def padding_first(input_ids, attention_mask):
    """
    (order, is_text) of a padded batch, both (B, T): the indices of the padding of each row before those of
    its text, and for each of these 0 for padding, 1 for text. (None, None) without padding. The model's
    argument `pieces` masks the two from each other.
    """
    if attention_mask is None or attention_mask.shape == input_ids.shape and attention_mask.all():
        return None, None
    if attention_mask.shape != input_ids.shape:
        raise ValueError(f'attention_mask: takes the shape of input_ids, {list(input_ids.shape)}, '
                         f'found {list(attention_mask.shape)}')
    is_text = (attention_mask != 0).long()
    order = is_text.argsort(dim=1, stable=True)
    return order, is_text.gather(1, order)

"""The paper's text tower: new bidirectional layers over a Chinese vocabulary, then CLIP's own causal text layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedConfig
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.clip.modeling_clip import CLIPEncoder, CLIPEncoderLayer, CLIPPreTrainedModel


class EfficientCLIPTextConfig(PreTrainedConfig):
    """Sizes of the tower; the defaults are the published ones.

    `clip`, a CLIPTextConfig or its values, describes CLIP's part: its layers, and the positions and final norm of the
    whole tower. ValueError when it is not `hidden_size` wide.
    """

    model_type = "efficientclip_text"
    sub_configs_defaults = {"clip": CLIPTextConfig}  # type: ignore[dict-item]

    vocab_size: int = 30_000
    hidden_size: int = 512
    num_hidden_layers: int = 20
    num_attention_heads: int = 8
    intermediate_size: int = 2048
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    initializer_factor: float = 1.0
    clip: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.clip, CLIPTextConfig):
            self.clip = CLIPTextConfig(**{"hidden_size": self.hidden_size, **(self.clip or {})})
        super().__post_init__(**kwargs)
        if self.clip.hidden_size != self.hidden_size:
            raise ValueError(f"hidden_size is {self.hidden_size}, but CLIP's layers are {self.clip.hidden_size} wide")


class GatedMLP(nn.Module):
    """GEGLU (arXiv 2002.05202): half of the inner units gate the other half."""

    def __init__(self, config: EfficientCLIPTextConfig) -> None:
        super().__init__()
        self.config = config
        self.activation = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, 2 * config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        values, gates = self.fc1(states).chunk(2, dim=-1)
        mixed: torch.Tensor = self.fc2(values * self.activation(gates))
        return mixed


class GatedLayer(CLIPEncoderLayer):
    """CLIP's pre-norm layer with a gated second half; which way it attends is the caller's to say."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.mlp: Any = GatedMLP(config)


class EfficientCLIPTextModel(CLIPPreTrainedModel):
    """Token ids to hidden states, which are read at the end token; packed or padded by `attn_implementation`.

    As in the released code, CLIP's positions are added once, under the new layers (the residual stream carries them
    up), and the vocabulary head reads what the end token reads: the top, so MLM trains the whole tower. Attention is
    scaled by the width of a head, where the released code takes that of the tower.
    """

    config_class = EfficientCLIPTextConfig
    base_model_prefix = ""
    _input_embed_layer = "token_embedding"
    supports_gradient_checkpointing = True
    _no_split_modules = ["CLIPEncoderLayer", "GatedLayer"]

    def __init__(self, config: EfficientCLIPTextConfig) -> None:
        super().__init__(config)
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.clip.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList([GatedLayer(config) for _ in range(config.num_hidden_layers)])
        self.clip = CLIPEncoder(config.clip)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.clip.layer_norm_eps)
        self.post_init()

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # In code outside its own package, Hugging Face skips modules without parameters of their own: CLIP's rules.
        super()._initialize_weights(module, is_custom_code=False)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, GatedMLP):
            # CLIP's rule for the MLPs of its own layers.
            width, layers = module.config.hidden_size, module.config.num_hidden_layers
            init.normal_(module.fc1.weight, std=(2 * width) ** -0.5)
            init.normal_(module.fc2.weight, std=width**-0.5 * (2 * layers) ** -0.5)

    def take_clip(self, clip: CLIPTextModel) -> None:
        """Copy CLIP's text layers, positions and final norm; its English token embedding stays behind."""
        self.clip.load_state_dict(clip.encoder.state_dict())
        self.position_embedding.load_state_dict(clip.embeddings.position_embedding.state_dict())
        self.final_layer_norm.load_state_dict(clip.final_layer_norm.state_dict())

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """Last hidden states [n, L, hidden] of int64 [n, L]; `kwargs` go to the attention, packed `segments` for one.

        `token_type_ids`, which BERT's tokenizers give, mean nothing here.
        """
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        states = self.token_embedding(input_ids) + self.position_embedding(position_ids)
        mask = create_bidirectional_mask(config=self.config, inputs_embeds=states, attention_mask=attention_mask)
        for layer in self.layers:
            states = layer(states, mask, is_causal=False, **kwargs)
        mask = create_causal_mask(
            config=self.config.clip, inputs_embeds=states, attention_mask=attention_mask, past_key_values=None
        )
        states = self.clip(states, mask, is_causal=True, **kwargs).last_hidden_state
        return BaseModelOutput(last_hidden_state=self.final_layer_norm(states))

"""The attention processor that replaces diffusers' ``AttnProcessor2_0`` and ``FusedAttnProcessor2_0``."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor

from delora_diffusers.adapter.projections import Projection
from delora_diffusers.adapter.tensors import Adapter
from delora_diffusers.errors import InputError


class AdaptedAttnProcessor:
    """Scaled dot-product attention whose adapted projections are computed by the adapter.

    Projections that read the same input (q, k and v of self-attention; k and v of cross-attention) are computed
    as one product. At strength 0 the stock processor runs, so the output equals the base model's bit for bit.

    Args:
        adapter: the adapter that refreshes the projections.
        stock: the processor this one replaces.
        projections: the adapted products of this attention.
        prefix: the attention's name in the model, a prefix of the projections' names.
    """

    def __new__(cls, *arguments: Any, **keywords: Any) -> Any:
        # Diffusers' IP-Adapters replace each processor that they leave alone by ``type(processor)()``.
        return super().__new__(cls) if arguments or keywords else AttnProcessor2_0()

    def __init__(self, adapter: Adapter, stock: Any, projections: list[Projection], prefix: str):
        self.adapter = adapter
        self.stock = stock
        self._projections = {
            name.removeprefix(prefix + "."): (projection, index)
            for projection in projections
            for index, name in enumerate(projection.names)
        }

    def __deepcopy__(self, _: dict[int, Any]) -> Any:
        raise copy_error()

    def _project(self, attn: Attention, x: Tensor, *names: str) -> Sequence[Tensor]:
        """The outputs of the named linear modules of ``attn`` for one input x (batch, tokens, in)."""
        members = [self._projections.get(name) for name in names]
        first = members[0]
        if first is not None and all(member is not None and member[0] is first[0] for member in members):
            return first[0](x, first[1], len(names))
        return [
            attn.get_submodule(name)(x) if member is None else member[0](x, member[1], 1)[0]
            for name, member in zip(names, members)
        ]

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Attention over hidden_states (batch, tokens, channels) or (batch, channels, height, width)."""
        if self.adapter.strength == 0:
            return self.stock(attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs)

        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        image_shape = hidden_states.shape if hidden_states.ndim == 4 else None
        if image_shape is not None:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)

        if encoder_hidden_states is None:
            query, key, value = self._project(attn, hidden_states, "to_q", "to_k", "to_v")
        else:
            if attn.norm_cross:
                encoder_hidden_states = attn.norm_encoder_hidden_states(encoder_hidden_states)
            (query,) = self._project(attn, hidden_states, "to_q")
            key, value = self._project(attn, encoder_hidden_states, "to_k", "to_v")

        query, key, value = (t.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for t in (query, key, value))
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        if attention_mask is not None:
            batch, _, tokens, _ = key.shape
            attention_mask = attn.prepare_attention_mask(attention_mask, tokens, batch)
            attention_mask = attention_mask.unflatten(0, (batch, attn.heads))
        hidden_states = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        hidden_states = hidden_states.transpose(1, 2).flatten(2).to(query.dtype)

        (hidden_states,) = self._project(attn, hidden_states, "to_out.0")
        hidden_states = attn.get_submodule("to_out.1")(hidden_states)
        if image_shape is not None:
            hidden_states = hidden_states.transpose(1, 2).reshape(image_shape)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states if attn.rescale_output_factor == 1 else hidden_states / attn.rescale_output_factor


def copy_error() -> InputError:
    """The error for copying an adapted model: the copy would share the adapter's weights with the original."""
    return InputError("a model with an adapter attached cannot be copied; detach it, copy, and load the adapter again.")

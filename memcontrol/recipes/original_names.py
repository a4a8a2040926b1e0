"""Owns what original models, whose names sd-scripts keeps, call the layers that diffusers names anew."""

from __future__ import annotations

import re

from memcontrol.core.errors import MemControlError

_FLUX_DOUBLE = {
    "attn.to_q": "img_attn.qkv",
    "attn.to_k": "img_attn.qkv",
    "attn.to_v": "img_attn.qkv",
    "attn.to_out.0": "img_attn.proj",
    "attn.add_q_proj": "txt_attn.qkv",
    "attn.add_k_proj": "txt_attn.qkv",
    "attn.add_v_proj": "txt_attn.qkv",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
}
_FLUX_SINGLE = {
    "attn.to_q": "linear1",
    "attn.to_k": "linear1",
    "attn.to_v": "linear1",
    "proj_mlp": "linear1",
    "proj_out": "linear2",
    "norm.linear": "modulation.lin",
}


def name_flux_layer(name: str) -> str | None:
    """What the original Flux calls the layer that diffusers' module is, or is a part of; None: outside of
    the blocks."""
    block, _, rest = name.partition(".")
    number, _, part = rest.partition(".")
    if block == "transformer_blocks" and part in _FLUX_DOUBLE:
        return f"double_blocks.{number}.{_FLUX_DOUBLE[part]}"
    if block == "single_transformer_blocks" and part in _FLUX_SINGLE:
        return f"single_blocks.{number}.{_FLUX_SINGLE[part]}"
    return None


_SD3_PARTS = {
    "attn.to_q": "x_block.attn.qkv",
    "attn.to_k": "x_block.attn.qkv",
    "attn.to_v": "x_block.attn.qkv",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.add_q_proj": "context_block.attn.qkv",
    "attn.add_k_proj": "context_block.attn.qkv",
    "attn.add_v_proj": "context_block.attn.qkv",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.to_q": "x_block.attn2.qkv",
    "attn2.to_k": "x_block.attn2.qkv",
    "attn2.to_v": "x_block.attn2.qkv",
    "attn2.to_out.0": "x_block.attn2.proj",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
}


def name_sd3_layer(name: str) -> str | None:
    """What the original Stable Diffusion 3 calls the layer that diffusers' module is, or is a part of."""
    block, _, rest = name.partition(".")
    number, _, part = rest.partition(".")
    if block != "transformer_blocks" or part not in _SD3_PARTS:
        return None
    return f"joint_blocks.{number}.{_SD3_PARTS[part]}"


_SDXL_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


def name_sdxl_layer(name: str) -> str:
    """What the original SDXL, whose names sd-scripts keeps (library/sdxl_original_unet.py), calls diffusers'
    module. Raises MemControlError for what lies outside of the blocks."""
    if found := re.fullmatch(r"(down|up)_blocks\.(\d)\.(resnets|attentions)\.(\d)\.(.*)", name):
        side, block, kind, number, part = found.groups()
        place = 3 * int(block) + int(number) + (side == "down")
        where = f"{'input' if side == 'down' else 'output'}_blocks.{place}.{int(kind == 'attentions')}"
    elif found := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", name):
        kind, number, part = found.groups()
        where = f"middle_block.{1 if kind == 'attentions' else 2 * int(number)}"
    elif found := re.fullmatch(r"down_blocks\.(\d)\.downsamplers\.0\.conv", name):
        return f"input_blocks.{3 * int(found[1]) + 3}.0.op"
    elif found := re.fullmatch(r"up_blocks\.(\d)\.upsamplers\.0\.conv", name):
        return f"output_blocks.{3 * int(found[1]) + 2}.2.conv"
    else:
        raise MemControlError(f"it does not reach layer '{name}'")
    return f"{where}.{_SDXL_RESNET.get(part, part) if kind == 'resnets' else part}"

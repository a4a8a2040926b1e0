"""A Stable Diffusion checkpoint in one file under the names of the original code: the inverse of what
diffusers reads it with, as in Hugging Face's scripts/convert_diffusers_to_original_stable_diffusion.py."""

import re

from safetensors.torch import save_file

OUTER = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def rename_unet(name, n_blocks, n_layers):
    """Each level has n_layers blocks on the way down, one more on the way up."""
    for ours, theirs in OUTER.items():
        if name.startswith(f"{ours}."):
            return name.replace(ours, theirs, 1)
    way, rest = name.split(".", 1)
    if way == "mid_block":
        kind, number, rest = rest.split(".", 2)
        place = "middle_block.1" if kind == "attentions" else f"middle_block.{2 * int(number)}"
        return f"{place}.{rename_inside(kind, rest)}"
    block, kind, number, rest = rest.split(".", 3)
    block, number = int(block), int(number)
    if way == "down_blocks":
        at = 1 + block * (n_layers + 1) + (n_layers if kind == "downsamplers" else number)
        if kind == "downsamplers":
            return f"input_blocks.{at}.0.{rest.replace('conv', 'op')}"
        return f"input_blocks.{at}.{int(kind == 'attentions')}.{rename_inside(kind, rest)}"
    at = block * (n_layers + 1) + (n_layers if kind == "upsamplers" else number)
    if kind == "upsamplers":  # after the attention, where the block has one
        return f"output_blocks.{at}.{{after}}.{rest}"
    return f"output_blocks.{at}.{int(kind == 'attentions')}.{rename_inside(kind, rest)}"


def rename_inside(kind, rest):
    if kind == "attentions":
        return rest
    part, _, end = rest.rpartition(".")
    return f"{RESNET[part]}.{end}"


def rename_autoencoder(name, n_blocks):
    name = name.replace("conv_norm_out", "norm_out").replace("mid_block.attentions.0", "mid.attn_1")
    if "mid.attn_1" in name:
        for ours, theirs in ATTENTION.items():
            name = name.replace(f".{ours}.", f".{theirs}.")
        return name
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{n_blocks - 1 - int(m[1])}.block", name)
    name = re.sub(
        r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{n_blocks - 1 - int(m[1])}.upsample", name
    )
    return name.replace("conv_shortcut", "nin_shortcut")


def convert_pipeline(pipeline):
    """The pipeline's weights under the original names."""
    config, found = pipeline.unet.config, {}
    n_blocks, n_layers = len(config.block_out_channels), config.layers_per_block
    for name, tensor in pipeline.unet.state_dict().items():
        block = re.match(r"up_blocks\.(\d+)", name)
        has_attention = block and "Attn" in config.up_block_types[int(block[1])]
        renamed = rename_unet(name, n_blocks, n_layers).format(after=2 if has_attention else 1)
        found[f"model.diffusion_model.{renamed}"] = tensor
    for name, tensor in pipeline.vae.state_dict().items():
        renamed = rename_autoencoder(name, len(pipeline.vae.config.block_out_channels))
        if "mid.attn_1" in renamed and renamed.endswith("weight") and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]  # 1 x 1 convolutions there
        found[f"first_stage_model.{renamed}"] = tensor
    for name, tensor in pipeline.text_encoder.state_dict().items():
        inner = name if name.startswith("text_model.") else f"text_model.{name}"
        found[f"cond_stage_model.transformer.{inner}"] = tensor
    return found


def write_checkpoint(pipeline, path, dtype=None):
    state = {
        name: tensor.to(dtype or tensor.dtype).contiguous()
        for name, tensor in convert_pipeline(pipeline).items()
    }
    save_file(state, path, {"format": "pt"})
    return path

"""Names and layouts of open_clip's tensors: one table per family of towers, used both ways.

Image towers: open_clip's own VisionTransformer and ModifiedResNet, and timm's SigLIP trunks. Text
towers: open_clip's own, at the top level or below `text.`, and transformers' BERT.
"""

from clip_jax.config import ImageTowerConfig, ModelConfig
from clip_jax.interop.table import (
    Row,
    attention_out,
    convolution,
    fused_projection,
    linear,
    norm,
    patch_convolution,
    same,
    split_projections,
    transposed,
)

# Buffers, and the constants among the tensors of OpenAI's archives: no weights.
IGNORED = (
    r"(text\.)?attn_mask",
    r"text\.transformer\.embeddings\.position_ids",
    r"input_resolution|context_length|vocab_size",
)
BATCHES_TRACKED = "num_batches_tracked"  # batch norm's count of its updates, int64

_STAGES = 4


def rows(model: ModelConfig, *, custom_text: bool, vector_scalars: bool) -> list[Row]:
    """All rows of a model whose config the `open_clip_config` module has accepted.

    custom_text: a CustomTextCLIP, whose text tower lies below `text.`. vector_scalars: logit scale
    and bias have shape (1,) there, not ().
    """
    shape = (1,) if vector_scalars else ()
    table = [*_image_rows(model), *_text_rows(model, "text." if custom_text else "")]
    table.append(same("log_logit_scale", "logit_scale", shape=shape))
    if model.logit_bias_init is not None:
        table.append(same("logit_bias", "logit_bias", shape=shape))
    return table


def is_timm(image: ImageTowerConfig) -> bool:
    """Whether the tower is one of timm's SigLIP trunks, not one of open_clip's own ViTs."""
    return image.kind == "vit" and image.pooling == "attention" and not image.class_token


def batch_norms(image: ImageTowerConfig) -> list[tuple[str, str]]:
    """Batch norms of a ResNet: our path and open_clip's name of each."""
    found = [(f"image/stem/norm_{i}", f"visual.bn{i + 1}") for i in range(3)]
    for ours, theirs, has_shortcut in _blocks(image):
        found += [(f"{ours}/norm_{i}", f"{theirs}.bn{i + 1}") for i in range(3)]
        if has_shortcut:
            found.append((f"{ours}/shortcut_norm", f"{theirs}.downsample.1"))
    return found


# ---- Image towers ----------------------------------------------------------------------------


def _image_rows(model: ModelConfig) -> list[Row]:
    if model.image.kind == "resnet":
        return _resnet_rows(model.image)
    return _timm_rows(model) if is_timm(model.image) else _vit_rows(model.image)


def _vit_rows(image: ImageTowerConfig) -> list[Row]:
    stem = "image/stem/project/kernel"
    table = [
        patch_convolution(stem, "visual.conv1.weight", patch_size=image.patch_size),
        same("image/class_embedding", "visual.class_embedding"),
        same("image/position_embedding", "visual.positional_embedding"),
    ]
    if image.pre_norm:
        table += norm("image/pre_norm", "visual.ln_pre")
    table += _residual_blocks("image/blocks", "visual.transformer.resblocks.{layer}")
    block = "visual.transformer.resblocks.{layer}"
    if image.layer_scale_init is not None:
        table.append(same("image/blocks/attention_scale", f"{block}.ls_1.gamma"))
        table.append(same("image/blocks/mlp_scale", f"{block}.ls_2.gamma"))
    if image.qk_norm:
        table += norm("image/blocks/attention/query_norm", f"{block}.attn.ln_q")
        table += norm("image/blocks/attention/key_norm", f"{block}.attn.ln_k")
    table += norm("image/final_norm", "visual.ln_post")
    return [*table, same("image_projection/kernel", "visual.proj")]  # [D, E], as ours


def _timm_rows(model: ModelConfig) -> list[Row]:
    image, trunk = model.image, "visual.trunk"
    stem, block = "image/stem/project", f"{trunk}.blocks.{{layer}}"
    pooling, pool = "image/pooling", f"{trunk}.attn_pool"
    table = [
        patch_convolution(
            f"{stem}/kernel", f"{trunk}.patch_embed.proj.weight", patch_size=image.patch_size
        ),
        same(f"{stem}/bias", f"{trunk}.patch_embed.proj.bias"),
        same("image/position_embedding", f"{trunk}.pos_embed", shape=(1, -1, image.width)),
        *norm("image/blocks/attention_norm", f"{block}.norm1"),
        *fused_projection(
            "image/blocks/attention/qkv", f"{block}.attn.qkv.weight", f"{block}.attn.qkv.bias"
        ),
        *attention_out("image/blocks/attention/out", f"{block}.attn.proj"),
        *norm("image/blocks/mlp_norm", f"{block}.norm2"),
        *linear("image/blocks/mlp/up", f"{block}.mlp.fc1"),
        *linear("image/blocks/mlp/down", f"{block}.mlp.fc2"),
        *norm("image/final_norm", f"{trunk}.norm"),
        same(f"{pooling}/probe", f"{pool}.latent", shape=(1, 1, -1)),
        *linear(f"{pooling}/query", f"{pool}.q"),
        *fused_projection(f"{pooling}/key_value", f"{pool}.kv.weight", f"{pool}.kv.bias"),
        *attention_out(f"{pooling}/out", f"{pool}.proj"),
        *norm(f"{pooling}/norm", f"{pool}.norm"),
        *linear(f"{pooling}/mlp/up", f"{pool}.mlp.fc1"),
        *linear(f"{pooling}/mlp/down", f"{pool}.mlp.fc2"),
    ]
    if model.image_projection != "none":
        has_bias = model.image_projection == "linear_bias"
        table += linear("image_projection", "visual.head.proj", bias=has_bias)
    return table


def _blocks(image: ImageTowerConfig) -> list[tuple[str, str, bool]]:
    """Our path and open_clip's name of each bottleneck, and whether its shortcut has weights."""
    return [
        (f"image/stage_{i}/block_{j}", f"visual.layer{i + 1}.{j}", j == 0)
        for i in range(_STAGES)
        for j in range(image.resnet_layers[i])
    ]


def _resnet_rows(image: ImageTowerConfig) -> list[Row]:
    table = [
        convolution(f"image/stem/convolution_{i}/kernel", f"visual.conv{i + 1}.weight")
        for i in range(3)
    ]
    for ours, theirs, has_shortcut in _blocks(image):
        table += [
            convolution(f"{ours}/convolution_{i}/kernel", f"{theirs}.conv{i + 1}.weight")
            for i in range(3)
        ]
        if has_shortcut:
            shortcut = f"{theirs}.downsample.0.weight"
            table.append(convolution(f"{ours}/shortcut_convolution/kernel", shortcut))
    for ours, theirs in batch_norms(image):
        table += norm(ours, theirs)
        table.append(same(f"{ours}/mean", f"{theirs}.running_mean"))
        table.append(same(f"{ours}/var", f"{theirs}.running_var"))
    pooling, pool = "image/pooling", "visual.attnpool"
    table.append(same(f"{pooling}/position_embedding", f"{pool}.positional_embedding"))
    for part in ("query", "key", "value"):
        table += linear(f"{pooling}/{part}", f"{pool}.{part[0]}_proj")
    return [*table, *attention_out(f"{pooling}/out", f"{pool}.c_proj")]


# ---- Text towers -----------------------------------------------------------------------------


def _text_rows(model: ModelConfig, prefix: str) -> list[Row]:
    if model.text.kind == "bert":
        return _bert_rows(model)
    table = [
        same("text/token_embedding", f"{prefix}token_embedding.weight"),
        same("text/position_embedding", f"{prefix}positional_embedding"),
        *_residual_blocks("text/blocks", f"{prefix}transformer.resblocks.{{layer}}"),
        *norm("text/final_norm", f"{prefix}ln_final"),
    ]
    projection = f"{prefix}text_projection"
    if model.text_projection == "linear":
        table.append(same("text_projection/kernel", projection))  # a bare parameter [D, E]
    elif model.text_projection == "linear_bias":
        table += linear("text_projection", projection)
    return table


def _bert_rows(model: ModelConfig) -> list[Row]:
    embeddings = "text.transformer.embeddings"
    layer = "text.transformer.encoder.layer.{layer}"
    parts = [f"{layer}.attention.self.{part}" for part in ("query", "key", "value")]
    table = [
        same("text/token_embedding", f"{embeddings}.word_embeddings.weight"),
        same("text/position_embedding", f"{embeddings}.position_embeddings.weight"),
        same("text/segment_embedding", f"{embeddings}.token_type_embeddings.weight"),
        *norm("text/embedding_norm", f"{embeddings}.LayerNorm"),
        *split_projections("text/blocks/attention/qkv", parts),
        *attention_out("text/blocks/attention/out", f"{layer}.attention.output.dense"),
        *norm("text/blocks/attention_norm", f"{layer}.attention.output.LayerNorm"),
        *linear("text/blocks/mlp/up", f"{layer}.intermediate.dense"),
        *linear("text/blocks/mlp/down", f"{layer}.output.dense"),
        *norm("text/blocks/mlp_norm", f"{layer}.output.LayerNorm"),
    ]
    if model.text.pooler:
        table += linear("text/pooler", "text.transformer.pooler.dense")
    if model.text_projection == "linear":
        table.append(transposed("text_projection/kernel", "text.proj.weight"))
    elif model.text_projection == "mlp":
        table.append(transposed("text_projection/up/kernel", "text.proj.0.weight"))
        table.append(transposed("text_projection/down/kernel", "text.proj.2.weight"))
    return table


def _residual_blocks(ours: str, theirs: str) -> list[Row]:
    """open_clip's ResidualAttentionBlock."""
    return [
        *norm(f"{ours}/attention_norm", f"{theirs}.ln_1"),
        *fused_projection(
            f"{ours}/attention/qkv", f"{theirs}.attn.in_proj_weight", f"{theirs}.attn.in_proj_bias"
        ),
        *attention_out(f"{ours}/attention/out", f"{theirs}.attn.out_proj"),
        *norm(f"{ours}/mlp_norm", f"{theirs}.ln_2"),
        *linear(f"{ours}/mlp/up", f"{theirs}.mlp.c_fc"),
        *linear(f"{ours}/mlp/down", f"{theirs}.mlp.c_proj"),
    ]

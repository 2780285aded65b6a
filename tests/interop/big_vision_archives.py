"""Random two-tower archives under big_vision's names, and what they mean, in NumPy and float64."""

import math

import numpy as np

WIDTH, HEADS, DEPTH, MLP, PATCH, GRID = 32, 4, 3, 80, 8, 4
VOCAB, LENGTH = 60, 10


def encoder(prefix, random, *, scanned, depth=DEPTH):
    shapes = {
        "LayerNorm_0/scale": (WIDTH,),
        "LayerNorm_0/bias": (WIDTH,),
        "LayerNorm_1/scale": (WIDTH,),
        "LayerNorm_1/bias": (WIDTH,),
        **attention_shapes(),
        **mlp_shapes(),
    }
    tensors = {}
    for name, shape in shapes.items():
        layers = [random(shape, name) for _ in range(depth)]
        if scanned:
            tensors[f"{prefix}/encoderblock/{name}"] = np.stack(layers)
        else:
            for i, layer in enumerate(layers):
                tensors[f"{prefix}/encoderblock_{i}/{name}"] = layer
    for name in ("scale", "bias"):
        tensors[f"{prefix}/encoder_norm/{name}"] = random((WIDTH,), name)
    return tensors


def attention_shapes():
    attention, head = "MultiHeadDotProductAttention_0", WIDTH // HEADS
    shapes = {f"{attention}/out/kernel": (HEADS, head, WIDTH), f"{attention}/out/bias": (WIDTH,)}
    for part in ("query", "key", "value"):
        shapes |= {
            f"{attention}/{part}/kernel": (WIDTH, HEADS, head),
            f"{attention}/{part}/bias": (HEADS, head),
        }
    return shapes


def mlp_shapes():
    return {
        "MlpBlock_0/Dense_0/kernel": (WIDTH, MLP),
        "MlpBlock_0/Dense_0/bias": (MLP,),
        "MlpBlock_0/Dense_1/kernel": (MLP, WIDTH),
        "MlpBlock_0/Dense_1/bias": (WIDTH,),
    }


def map_head(prefix, random):
    shapes = {"probe": (1, 1, WIDTH), "LayerNorm_0/scale": (WIDTH,), "LayerNorm_0/bias": (WIDTH,)}
    shapes |= attention_shapes() | mlp_shapes()
    return {f"{prefix}/MAPHead_0/{name}": random(shape, name) for name, shape in shapes.items()}


def archive(*, scanned=False, image_head=False, bias=True, naflex=False, pooling="map", seed=0):
    """The arrays of a two-tower checkpoint by name."""
    rng = np.random.default_rng(seed)

    def random(shape, name=""):
        values = 0.2 * rng.standard_normal(shape, np.float32)
        return values + 1 if name.endswith("scale") else values

    tensors = encoder("img/Transformer", random, scanned=scanned)
    tensors |= encoder("txt/Encoder_0", random, scanned=scanned)
    tensors["img/embedding/kernel"] = random((PATCH, PATCH, 3, WIDTH))
    tensors["img/pos_embedding"] = random((1, GRID**2, WIDTH))
    if naflex:
        tensors["img/embedding/kernel"] = random((PATCH * PATCH * 3, WIDTH))
        tensors["img/pos_embedding"] = random((GRID, GRID, WIDTH))
    tensors["img/embedding/bias"] = random((WIDTH,))
    if pooling == "map":
        tensors |= map_head("img", random)
    elif pooling == "tok":
        tensors["img/cls"] = random((1, 1, WIDTH))
    tensors["txt/Embed_0/embedding"] = random((VOCAB, WIDTH))
    tensors["txt/pos_embedding"] = random((1, LENGTH, WIDTH))
    tensors["txt/head/kernel"], tensors["txt/head/bias"] = random((WIDTH, WIDTH)), random((WIDTH,))
    if image_head:
        tensors["img/head/kernel"] = random((WIDTH, WIDTH))
        tensors["img/head/bias"] = random((WIDTH,))
    tensors["t"] = np.array([4.7], np.float32)
    if bias:
        tensors["b"] = np.array([-12.9], np.float32)
    return {f"params/{name}": tensor for name, tensor in tensors.items()}


def saved(tensors, folder, name="siglip.npz"):
    np.savez(folder / name, **tensors)
    return folder / name


def sample_inputs(count=3):
    rng = np.random.default_rng(7)
    side = GRID * PATCH
    return {
        "image": rng.standard_normal((count, side, side, 3), np.float32),
        "tokens": rng.integers(0, VOCAB, (count, LENGTH), dtype=np.int32),
    }


# ---- The formula, in NumPy and float64 -------------------------------------------------------


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def layer_norm(x, tensors, name, layer=None):
    scale, bias = (at(tensors, f"{name}/{part}", layer) for part in ("scale", "bias"))
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * scale + bias


def at(tensors, name, layer):
    array = tensors[name] if layer is None else tensors[name][layer]
    return array.astype(np.float64)


def attend(queries, tokens, tensors, name, layer=None):
    name = f"{name}/MultiHeadDotProductAttention_0"

    def projected(x, part):
        kernel, bias = (at(tensors, f"{name}/{part}/{p}", layer) for p in ("kernel", "bias"))
        return np.einsum("btd,dnh->btnh", x, kernel) + bias

    q, k, v = projected(queries, "query"), projected(tokens, "key"), projected(tokens, "value")
    scores = np.einsum("bqnh,bknh->bnqk", q, k) / math.sqrt(WIDTH // HEADS)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    mixed = np.einsum("bnqk,bknh->bqnh", weights, v)
    out, bias = (at(tensors, f"{name}/out/{p}", layer) for p in ("kernel", "bias"))
    return np.einsum("btnh,nhd->btd", mixed, out) + bias


def mlp(x, tensors, name, layer=None):
    for i in range(2):
        kernel, bias = (
            at(tensors, f"{name}/MlpBlock_0/Dense_{i}/{p}", layer) for p in ("kernel", "bias")
        )
        x = x @ kernel + bias
        x = gelu_tanh(x) if i == 0 else x
    return x


def encode(x, tensors, name):
    """Of scanned archives."""
    block = f"{name}/encoderblock"
    for layer in range(DEPTH):
        normed = layer_norm(x, tensors, f"{block}/LayerNorm_0", layer)
        x = x + attend(normed, normed, tensors, block, layer)
        x = x + mlp(layer_norm(x, tensors, f"{block}/LayerNorm_1", layer), tensors, block, layer)
    return layer_norm(x, tensors, f"{name}/encoder_norm")


def patches_of(image):
    rows = image.reshape(-1, GRID, PATCH, GRID, PATCH, 3).transpose(0, 1, 3, 2, 4, 5)
    return rows.reshape(len(image), GRID**2, -1).astype(np.float64)


def expected_embeddings(tensors, inputs):
    tensors = {name.removeprefix("params/"): tensor for name, tensor in tensors.items()}
    kernel = tensors["img/embedding/kernel"].reshape(-1, WIDTH)
    x = patches_of(inputs["image"]) @ kernel + tensors["img/embedding/bias"]
    x = x + tensors["img/pos_embedding"].reshape(1, -1, WIDTH)
    if "img/cls" in tensors:
        x = np.concatenate([np.repeat(tensors["img/cls"], len(x), 0), x], axis=1)
    x = encode(x, tensors, "img/Transformer")
    if "img/MAPHead_0/probe" in tensors:
        probe = np.repeat(tensors["img/MAPHead_0/probe"], len(x), 0)
        x = attend(probe, x, tensors, "img/MAPHead_0")
        x = x + mlp(layer_norm(x, tensors, "img/MAPHead_0/LayerNorm_0"), tensors, "img/MAPHead_0")
        x = x[:, 0]
    else:
        x = x[:, 0] if "img/cls" in tensors else x.mean(1)
    if "img/head/kernel" in tensors:
        x = x @ tensors["img/head/kernel"] + tensors["img/head/bias"]
    y = tensors["txt/Embed_0/embedding"][inputs["tokens"]] + tensors["txt/pos_embedding"]
    y = encode(y, tensors, "txt/Encoder_0")[:, -1]
    y = y @ tensors["txt/head/kernel"] + tensors["txt/head/bias"]
    rows = {"image": x, "text": y}
    return {name: z / np.linalg.norm(z, axis=1, keepdims=True) for name, z in rows.items()}

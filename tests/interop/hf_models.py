"""Models of transformers with random weights, all of them perturbed."""

import numpy as np
import pytest
from models.vision_peers import transformers_or_skip

torch = pytest.importorskip("torch")
transformers = transformers_or_skip()

transformers.utils.logging.set_verbosity_error()  # on token ids beyond reduced vocabularies
transformers.utils.logging.disable_progress_bar()

VOCAB = 500  # an embedding table of full size would only take time


def clip_config(
    image: tuple[int, int, int],
    text: tuple[int, int, int],
    *,
    patch_size: int,
    image_size: int,
    projection_dim: int,
    activation: str = "quick_gelu",
    vocab_size: int = VOCAB,
):
    """`image` and `text` are (width, depth, heads)."""
    sizes = [
        {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": depth,
            "num_attention_heads": heads,
            "hidden_act": activation,
        }
        for width, depth, heads in (image, text)
    ]
    tokens = {"bos_token_id": vocab_size - 2, "eos_token_id": vocab_size - 1, "pad_token_id": 0}
    return transformers.CLIPConfig(
        projection_dim=projection_dim,
        vision_config=sizes[0] | {"patch_size": patch_size, "image_size": image_size},
        text_config=sizes[1] | {"vocab_size": vocab_size} | tokens,
    )


def siglip_config(width: int, heads: int, mlp: int, *, depth: int, naflex: bool = False, **vision):
    shared = {
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
    }
    tokens = {"vocab_size": VOCAB, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 1}
    kind = transformers.Siglip2Config if naflex else transformers.SiglipConfig
    return kind(vision_config=shared | vision, text_config=shared | tokens)


def dual_config(vision, *, width: int = 768, heads: int = 12, depth: int = 2):
    text = transformers.BertConfig(
        hidden_size=width,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        num_hidden_layers=depth,
        vocab_size=VOCAB,
        max_position_embeddings=64,
    )
    return transformers.VisionTextDualEncoderConfig(
        vision_config=vision.to_dict(), text_config=text.to_dict(), projection_dim=512
    )


def random_model(config):
    """Peers start biases at 0 and norms at 1: every parameter is moved."""
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def features(model, **inputs: np.ndarray) -> np.ndarray:
    """Unit-length embeddings of images or of texts."""
    tensors = {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in inputs.items()}
    with torch.inference_mode():
        encode = model.get_text_features if "input_ids" in tensors else model.get_image_features
        rows = encode(**tensors).pooler_output
    return (rows / rows.norm(dim=-1, keepdim=True)).numpy()

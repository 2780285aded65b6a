"""A CLIP of emoji in five minutes on two CPU cores: taught by one artist, tested on another.

Trained on Twemoji pictures and their Unicode names, and on the same drawings with black outlines
and as line art, because that is how other artists draw. Scored on OpenMoji, whose pictures it
never sees, and on concepts that were held out. docs/lab-log.md has what was tried.
"""

from clip_jax.config import (
    AugmentConfig,
    CheckpointConfig,
    DataConfig,
    EvalSetConfig,
    EvaluationConfig,
    ExperimentConfig,
    ImageTowerConfig,
    LoggingConfig,
    ModelConfig,
    ObjectViewConfig,
    OptimizerConfig,
    ScheduleConfig,
    SourceConfig,
    TextTowerConfig,
    TokenizerConfig,
    to_config_dict,
)


def _split(path: str, weight: float) -> SourceConfig:
    return SourceConfig(kind="quickstart", path=path, weight=weight, first_caption=0.6)


def get_config():
    return to_config_dict(
        ExperimentConfig(
            name="quickstart",
            num_steps=1800,
            global_batch_size=128,
            precision="float32",
            model=ModelConfig(
                name="ViT-emoji",
                image=ImageTowerConfig(
                    image_size=32,
                    patch_size=8,
                    stem="conv",
                    stem_widths=(64, 64, 128, 128),
                    stem_strides=(2, 1, 2, 1),
                    width=128,
                    depth=2,
                    num_heads=4,
                    activation="quick_gelu",
                    class_token=False,
                    pre_norm=False,
                    pooling="mean",
                    mean=(0.5, 0.5, 0.5),
                    std=(0.5, 0.5, 0.5),
                ),
                text=TextTowerConfig(
                    vocab_size=2000,
                    eot_id=2,
                    context_length=12,
                    width=128,
                    depth=1,
                    num_heads=4,
                    activation="quick_gelu",
                    token_embedding_std=0.005,
                ),
                embed_dim=128,
            ),
            data=DataConfig(
                framing="object",
                tokenizer=TokenizerConfig(kind="bpe"),
                sources={
                    "base": _split("base", 0.3),
                    "outlined": _split("outlined", 2.5),
                    "line_art": _split("line_art", 0.8),
                    "skin_tones": _split("skin_tones", 0.1),
                    "flags": _split("flags", 0.1),
                },
                augment=AugmentConfig(
                    object_view=ObjectViewConfig(
                        stretch=0.3, rotation=0.3, color=0.5, grayscale=0.08, pale=0.1, hue=0.15
                    )
                ),
                num_threads=2,
            ),
            optimizer=OptimizerConfig(learning_rate=6e-4, weight_decay=0.1),
            schedule=ScheduleConfig(warmup_steps=50, end_fraction=0.01),
            evaluation=EvaluationConfig(
                batch_size=128,
                sets={
                    "unseen_artist": EvalSetConfig(
                        kind="quickstart",
                        path="unseen_artist",
                        description="OpenMoji: concepts of the training set, without flags, drawn "
                        "by artists whose pictures the model never saw.",
                    ),
                    "unseen_concept": EvalSetConfig(
                        kind="quickstart",
                        path="unseen_concept",
                        description="Twemoji: concepts held out of training, without flags.",
                    ),
                },
            ),
            checkpoint=CheckpointConfig(every_steps=450),
            logging=LoggingConfig(every_steps=20),
        )
    )

"""A CLIP of emoji in minutes on a CPU: trained on one artist's pictures, tested on another's."""

from clip_jax.config import (
    AugmentConfig,
    CheckpointConfig,
    DataConfig,
    EvalSetConfig,
    EvaluationConfig,
    ExperimentConfig,
    ImageTowerConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    SourceConfig,
    TextTowerConfig,
    to_config_dict,
)


def get_config():
    return to_config_dict(
        ExperimentConfig(
            name="quickstart",
            num_steps=40,
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
                    depth=3,
                    num_heads=4,
                    pooling="mean",
                ),
                text=TextTowerConfig(
                    vocab_size=2000, eot_id=2, context_length=12, width=128, depth=1, num_heads=4
                ),
                embed_dim=128,
            ),
            data=DataConfig(
                sources={
                    "base": SourceConfig(kind="quickstart", path="base"),
                    "skin_tones": SourceConfig(kind="quickstart", path="skin_tones", weight=0.1),
                },
                augment=AugmentConfig(crop_scale=(0.7, 1.0)),
            ),
            optimizer=OptimizerConfig(learning_rate=2e-3, weight_decay=0.1),
            schedule=ScheduleConfig(warmup_steps=10),
            evaluation=EvaluationConfig(
                sets={
                    "unseen_artist": EvalSetConfig(
                        kind="quickstart",
                        path="unseen_artist",
                        description="Concepts of the training set, drawn by an artist never seen.",
                        templates=("{}", "a picture of {}"),
                    ),
                    "unseen_concept": EvalSetConfig(
                        kind="quickstart",
                        path="unseen_concept",
                        description="Concepts held out of training, drawn by the artist seen.",
                    ),
                }
            ),
            checkpoint=CheckpointConfig(every_steps=1000),
        )
    )

"""Fine-tunes any imported checkpoint on the quickstart's emoji, with its own tokenizer.

    clip-jax import --from DIR --format huggingface --output runs/imported
    clip-jax train --config=configs/finetune.py --workdir=runs/finetune \
        --config.start.model=runs/imported

The architecture, tokenizer, preprocessing and kind of loss are the checkpoint's. For a run of your
own replace the sources and the sets.
"""

from clip_jax.config import (
    AugmentConfig,
    CheckpointConfig,
    DataConfig,
    EvalSetConfig,
    EvaluationConfig,
    ExperimentConfig,
    LoggingConfig,
    OptimizerConfig,
    ScheduleConfig,
    SourceConfig,
    StartConfig,
    to_config_dict,
)


def get_config():
    return to_config_dict(
        ExperimentConfig(
            name="finetune",
            num_steps=200,
            global_batch_size=64,
            start=StartConfig(model="runs/imported"),
            data=DataConfig(
                sources={
                    "base": SourceConfig(kind="quickstart", path="base"),
                    "outlined": SourceConfig(kind="quickstart", path="outlined"),
                },
                augment=AugmentConfig(crop_scale=(0.75, 1.0)),
            ),
            # A tenth of the usual peak and little decay: the weights are good already.
            optimizer=OptimizerConfig(learning_rate=1e-5, weight_decay=0.01),
            schedule=ScheduleConfig(warmup_steps=20),
            evaluation=EvaluationConfig(
                batch_size=64,
                sets={
                    "unseen_artist": EvalSetConfig(
                        kind="quickstart",
                        path="unseen_artist",
                        templates=("an emoji of {}",),
                        description="OpenMoji: concepts of the training set, by other artists.",
                    )
                },
            ),
            checkpoint=CheckpointConfig(every_steps=100),
            logging=LoggingConfig(every_steps=10),
        )
    )

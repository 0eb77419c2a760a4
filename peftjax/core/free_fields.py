"""Config fields without an effect on the results of a run: when it saves, evaluates and logs, and how it reads data."""

FREE = (  # prefixes
    *("checkpoint.every", "checkpoint.minutes", "checkpoint.keep", "checkpoint.adapter"),
    *("data.workers", "data.tfds_data_dir", "eval.samples", "log.", "train.eval_every"),
)

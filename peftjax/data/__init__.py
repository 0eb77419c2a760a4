"""Records in, batches out: sources (TFDS, JSON Lines, Parquet), text (tokenizing, loss masks), packing, batches."""

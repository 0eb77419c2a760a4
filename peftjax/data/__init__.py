"""From records to batches, for any task.

Sources of records (JSON Lines, CSV, Parquet, TFDS, datasets of the Hugging Face hub, image folders), prompts and chats as
tokens with a loss, packing, padding, and the stream of batches with a position that a checkpoint can store.
"""

"""Token ids that have no row in a model's embedding table."""

from collections.abc import Iterable

import numpy as np

from peftjax.core.errors import UserError
from peftjax.data.tokenizer import Tokenizer
from peftjax.models.base import Model
from peftjax.nn.embedding import Embedding


def embedding_rows(model: Model) -> int | None:
    """Return the number of rows of a model's embedding table; None for a model that reads no tokens."""
    table = getattr(model, "embed", None)
    return table.in_features if isinstance(table, Embedding) else None


def check_rows(ids: Iterable[int], rows: int | None, tokenizer: Tokenizer, name: str) -> None:
    """Check that every token of a text has a row.

    Args:
        ids: The token ids.
        rows: The number of rows, as `embedding_rows` returns it.
        tokenizer: The tokenizer that made the ids.
        name: The name of the text, for messages.

    Raises:
        UserError: A token has no row.
    """
    found = np.asarray(ids)
    if rows is None or not found.size or found.max() < rows:
        return
    token = int(found.max())
    text = next((text for text in tokenizer.special_texts if tokenizer.token_id(text) == token), None)
    raise UserError(
        f"{name}: token {text or tokenizer.decode([token])!r} has the id {token}, but the model's embedding has {rows} rows; it "
        "was added to the tokenizer only. To add rows, set model.resize_embeddings=True (generate: --resize-embeddings)"
    )

"""Token ids that have no row in a model's embedding table."""

from collections.abc import Iterable

import numpy as np

from peftjax.core.errors import UserError
from peftjax.data.tokenizer import Tokenizer


def check_token_rows(ids: Iterable[int], rows: int | None, tokenizer: Tokenizer, name: str) -> None:
    """Check that every token of a text has a row.

    Args:
        ids: The token ids.
        rows: The number of rows, `Model.embedding_rows`.
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

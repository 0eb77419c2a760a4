"""Round a trained model to bfloat16 and write it, with its tokenizer, as the directory that the package contains.

python experiments/base_model/export.py --model=runs/base_model/run/model --out=runs/base_model/base
"""

import argparse
import pathlib

import peftjax

LIMIT = 8_000_000  # bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=pathlib.Path, required=True, help="Hugging Face directory of the trained model")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="Directory to write")
    options = parser.parse_args()

    model = peftjax.load_model(options.model, dtype="bfloat16")
    peftjax.save_model(model, options.out, source=options.model)
    size = sum(file.stat().st_size for file in options.out.iterdir())
    print(f"{options.out}: {size:,} bytes")
    if size > LIMIT:
        raise SystemExit(f"the model in the package may have at most {LIMIT:,} bytes")


if __name__ == "__main__":
    main()

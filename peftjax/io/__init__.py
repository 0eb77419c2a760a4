"""Reading and writing files of models, adapters and training states.

Hugging Face models, also quantized by bitsandbytes or in MXFP4; adapters of PEFT and AdapterHub, with their model cards;
uploads to the hub; and the checkpoints of a run, which orbax writes.
"""

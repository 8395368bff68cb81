"""From files to batches: readers, formats, chat rendering with loss masks, examples, splits, packing, batches.

    rows = read_rows("train.jsonl")                                 # readers: what stands in the file, with its line
    encoded = encode(rows, tokenizer, max_length=512, eos_id=0)     # examples: tokens, and which of them are learned
    epochs = Epochs(encoded.examples, row_tokens=512, seed=0, packs=True)
    batch = collate([[encoded.examples[i] for i in row] for row in epochs.rows(0)[:4]], width=512, ...)

Every fault of a file or of a row is a `DataError` that names file and line.
"""

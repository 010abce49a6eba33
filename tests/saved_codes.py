"""Product codes of an index, read from the file it is saved to: what the oracle needs to know of it."""

import json
import struct

import numpy as np

from longattn.reference.retrieval import ProductCodes

TYPES = {"U8": np.uint8, "F32": np.float32, "U64": np.uint64, "F64": np.float64, "U32": np.uint32}
BLOCK = 64


def product_codes(index, path):
    """`ProductCodes` of each KV head."""
    index.save(path)
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    found = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = (8 + size + offset for offset in entry["data_offsets"])
            found[name] = np.frombuffer(data[start:end], TYPES[entry["dtype"]]).reshape(entry["shape"])
    made = []
    for h in range(index.store.kv_heads):
        books = found[f"codebooks.{h}"].astype(np.float64)
        packed = found[f"codes.{h}"]
        if index.bits == 4:
            # Key k of a block has byte 4 (k % 16) + k / 16 of each 64, two subvectors in its halves.
            rows = packed.reshape(-1, -(-index.subvectors // 2), BLOCK)[
                ..., [4 * (k % 16) + k // 16 for k in range(BLOCK)]
            ]
            rows = np.stack([rows & 15, rows >> 4], axis=2).reshape(len(rows), -1, BLOCK)[:, : index.subvectors]
        else:
            rows = packed.reshape(-1, index.subvectors, BLOCK)
        codes = rows.transpose(0, 2, 1).reshape(-1, index.subvectors).astype(np.int64)
        bases = [found[name][h].astype(np.float64) if name in found else None for name in ("key_bases", "query_bases")]
        made.append(
            ProductCodes(
                found[f"centre.{h}"].astype(np.float64),
                books,
                found[f"residuals.{h}"].astype(np.float64),
                codes,
                found[f"value_ids.{h}"].astype(np.int64),
                *bases,
            )
        )
    return made

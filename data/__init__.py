"""Text → WebDataset shards → training windows. Knows no model and no process group.

    python -m data.prepare input=PATH output=DIR     text to shards (see --help)
    python -m data.index DIR                         indexes again, from the shards alone

What others may use is listed here. `prepare` and `index` are command lines first; in Python they are
`data.prepare.prepare(Preparation(...))` and `data.index.rebuild(folder)`.
"""

from data.corpus import Corpus, Span
from data.errors import DataError
from data.order import CYCLE, Place, SampleOrder
from data.samples import Batch, PackedSamples, micro_batches, prefetch

__all__ = [
    "CYCLE",
    "Batch",
    "Corpus",
    "DataError",
    "PackedSamples",
    "Place",
    "SampleOrder",
    "Span",
    "micro_batches",
    "prefetch",
]

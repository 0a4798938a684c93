"""`python -m data.index DIR`: writes the .idx of every shard again, from the tar files alone.

A shard that is not the one its manifest names is refused: a new index would only make the damage look sound.
"""

import sys
from pathlib import Path

from data.errors import DataError
from data.shards import MANIFEST, index_path, read_manifest, scan_shard, write_index


def rebuild(folder: Path) -> dict[str, int]:
    """Writes the indexes; returns the number of chunks by shard."""
    shards = sorted(folder.glob("*.tar"))
    if not shards:
        raise DataError(f"{folder} has no .tar shards; give the output folder of `python -m data.prepare`")
    named = {}
    if (folder / MANIFEST).exists():
        splits = read_manifest(folder)["splits"].values()
        named = {shard["name"]: shard["hash"] for split in splits for shard in split["shards"]}
    chunks = {}
    for shard in shards:
        index, digest = scan_shard(shard)
        if named.get(shard.name, digest) != digest:
            raise DataError(f"{shard} has hash {digest}, the manifest says {named[shard.name]}; copy the shard again")
        write_index(index_path(shard), index)
        chunks[shard.name] = len(index)
    return chunks


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or arguments[0] in ("-h", "--help"):
        print(__doc__.strip())
        return 0 if arguments[:1] in (["-h"], ["--help"]) else 2
    try:
        for name, chunks in rebuild(Path(arguments[0])).items():
            print(f"{name}  {chunks:,} chunks indexed")
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

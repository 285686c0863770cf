"""Makes mii/grpc_related/proto/ from this folder's .proto files.

    python -m venv /tmp/protoc && /tmp/protoc/bin/pip install "grpcio-tools==1.60.*" "setuptools<81"
    /tmp/protoc/bin/python proto/generate.py

Generated code asks for a protobuf and a grpcio at least as new as the tools, so the tools are the oldest that serve.
"""

from __future__ import annotations

import re
from pathlib import Path

from grpc_tools import protoc

_HERE = Path(__file__).resolve().parent
_TARGET = _HERE.parent / "mii" / "grpc_related" / "proto"


def main() -> None:
    """Writes ``<name>_pb2.py``, ``<name>_pb2.pyi`` and ``<name>_pb2_grpc.py`` for each ``<name>.proto``."""
    well_known = Path(protoc.__file__).parent / "_proto"
    for file in sorted(_HERE.glob("*.proto")):
        options = [f"--{kind}={_TARGET}" for kind in ("python_out", "pyi_out", "grpc_python_out")]
        if protoc.main(["", f"-I{_HERE}", f"-I{well_known}", *options, str(file)]) != 0:
            raise SystemExit(f"{file} has errors")
        services = _TARGET / f"{file.stem}_pb2_grpc.py"
        services.write_text(re.sub(r"^import (\w+_pb2)", r"from . import \1", services.read_text(), flags=re.M))


if __name__ == "__main__":
    main()

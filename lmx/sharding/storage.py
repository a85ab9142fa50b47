"""Addresses of storage that processes share: paths, and object stores."""

import importlib
import os

from etils import epath

from lmx.errors import UserError

GOOGLE = "gs"
"""The one object store that Orbax writes to: it takes others, as s3://, for relative paths."""


def storage(address: str | os.PathLike[str]) -> epath.Path:
    """The path of an address.

    Raises:
      UserError: an object store that cannot be written to, or whose client is not installed.
    """
    scheme, given, _ = os.fspath(address).partition("://")
    if given and scheme != GOOGLE:
        raise UserError(f"{address}: Orbax writes to file systems and to gs://; mount the bucket and give its path")
    if given:
        try:
            importlib.import_module("gcsfs")
        except ImportError as error:
            raise UserError(f"{address} is in an object store, which needs gcsfs: pip install 'lmx[gcs]'") from error
    return epath.Path(address)

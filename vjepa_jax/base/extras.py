"""Import packages that only an optional extra installs."""

import contextlib
from collections.abc import Iterator

from vjepa_jax.base.errors import UserError


@contextlib.contextmanager
def imports_of(extra: str) -> Iterator[None]:
    """Turn an ImportError inside the `with` block into one clear line.

    Args:
      extra: name of the extra that installs the imported packages.

    Raises:
      UserError: an import failed; the message names the package and the extra.
    """
    try:
        yield
    except ImportError as error:
        raise UserError(f'{error}: pip install "vjepa_jax[{extra}]"') from None

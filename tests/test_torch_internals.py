"""Private interfaces of torch: a test of each, which names what depends on it."""

import pytest

from fxtrain._torch_internals import INTERFACES


@pytest.mark.parametrize("path", INTERFACES)
def test_installed_torch_has_interface(path):
    interface = INTERFACES[path]
    assert interface.exists, f"torch lacks {path}, which fxtrain uses for {interface.purpose}"

"""The check of compiled steps against their uncompiled selves."""

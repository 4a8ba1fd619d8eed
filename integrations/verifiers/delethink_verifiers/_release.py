"""The releases of verifiers that this package was tried with, checked before it is imported."""

from delethink.integrations.releases import check_release

INSTALLED = check_release("verifiers", "0.4", "0.5")

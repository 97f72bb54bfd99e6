"""What an owner's text is about, said without the text: a domain embedding, and public documents that resemble it."""

from flexolmo_jax.domain.embed import embed_domain
from flexolmo_jax.domain.private_mean import PrivateMean
from flexolmo_jax.domain.proxies import ProxySelection, select_proxies

__all__ = ["PrivateMean", "ProxySelection", "embed_domain", "select_proxies"]

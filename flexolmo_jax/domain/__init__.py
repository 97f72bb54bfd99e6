"""What an owner's text is about, said without the text: a domain embedding, and public documents that resemble it."""

from flexolmo_jax.domain.embed import embed_domain


__all__ = ["embed_domain"]

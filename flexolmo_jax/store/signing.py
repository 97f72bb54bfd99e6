"""Detached signatures (Ed25519) over a contribution's manifest, and through its digests over every array."""

import base64
import binascii
import hashlib
import json
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from flexolmo_jax.errors import UserError
from flexolmo_jax.store.manifest import FILE

SIGNATURE = "signature.json"
_CONTEXT = b"flexolmo contribution manifest\n"
"""Comes before what is signed, so that a signature means nothing elsewhere."""
_LARGEST = 4096


def create_keys(private: Path) -> Path:
    """Makes a key pair, the private key in `private` and the public one beside it with the suffix `.pub`.

    Raises:
      UserError: one of the files exists, or cannot be written.
    """
    public = private.with_name(private.name + ".pub")
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    try:
        private.parent.mkdir(parents=True, exist_ok=True)
        private.touch(mode=0o600, exist_ok=False)
        private.write_bytes(pem)
        with public.open("xb") as file:
            file.write(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    except OSError as error:
        raise UserError(f"cannot write {error.filename or private}: {error.strerror}") from error
    return public


def sign(directory: Path, private: Path) -> str:
    """Writes the signature of a contribution's manifest beside it and returns the key's fingerprint.

    Raises:
      UserError: the key cannot be read or is of another kind.
    """
    try:
        key = load_pem_private_key(private.read_bytes(), password=None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise UserError(f"{private} is no private key that can be read: {error}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise UserError(f"{private} is no Ed25519 key; `flexolmo contribution keys` makes one")
    signature = key.sign(_CONTEXT + (directory / FILE).read_bytes())
    content = {"algorithm": "ed25519", "signature": base64.b64encode(signature).decode()}
    (directory / SIGNATURE).write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    return fingerprint(key.public_key())


def check(directory: Path, public: Path) -> str:
    """The fingerprint of the owner's public key, whose signature the contribution bears.

    Raises:
      UserError: there is no signature, or not of this key, or the manifest was changed after it was signed.
    """
    key = read_public(public)
    file = directory / SIGNATURE
    if not file.is_file():
        raise UserError(f"{directory} is not signed, but a signature by {public} is required")
    try:
        with file.open("rb") as opened:
            content = json.loads(opened.read(_LARGEST))
        signature = base64.b64decode(content["signature"], validate=True)
        if content["algorithm"] != "ed25519":
            raise ValueError("unknown algorithm")
    except (OSError, ValueError, KeyError, TypeError, RecursionError, binascii.Error) as error:
        raise UserError(f"{file} is no signature that this program can read") from error
    try:
        key.verify(signature, _CONTEXT + (directory / FILE).read_bytes())
    except InvalidSignature as error:
        raise UserError(f"the signature of {directory} is not one by {public} of what is there now") from error
    return fingerprint(key)


def read_public(file: Path) -> Ed25519PublicKey:
    """A public key in PEM form.

    Raises:
      UserError: the file cannot be read or holds another kind of key.
    """
    try:
        key = load_pem_public_key(file.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise UserError(f"{file} is no public key that can be read") from error
    if not isinstance(key, Ed25519PublicKey):
        raise UserError(f"{file} is no Ed25519 key")
    return key


def fingerprint(key: Ed25519PublicKey) -> str:
    """SHA-256 of the raw public key."""
    return hashlib.sha256(key.public_bytes(Encoding.Raw, PublicFormat.Raw)).hexdigest()

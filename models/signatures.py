"""A bundle's signature: Ed25519 (RFC 8032) over `bundle.json`, which names each artifact's SHA-256.

Keys are PEM files, as OpenSSL writes them (`openssl genpkey -algorithm ed25519`).
"""

from importlib.util import find_spec
from pathlib import Path

from models.files import read_small, write_atomically

# Beside the manifest.
SIGNATURE = "bundle.json.sig"
# Bytes; one has 64.
_MOST_OF_A_SIGNATURE = 1_000


class SignatureError(Exception):
    """A key that is none, or a signature that does not hold; the message says which."""


def _check_installed() -> None:
    if find_spec("cryptography") is None:
        raise SignatureError("signatures need cryptography: install the extra `signatures`")


def sign(content: bytes, private_key: Path, signature: Path) -> None:
    """Write the signature of a manifest.

    Args:
        content: Of the manifest's file.
        private_key: PEM, Ed25519, without a passphrase.
        signature: Where.

    Raises:
        SignatureError: The key cannot be used, or cryptography is not installed.
    """
    _check_installed()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(private_key.read_bytes(), None)
    except OSError as error:
        raise SignatureError(f"{private_key} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise SignatureError(
            f"{private_key} is no PEM file of a private key without a passphrase"
        ) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise SignatureError(f"{private_key} is no Ed25519 key")
    with write_atomically(signature) as temporary:
        temporary.write_bytes(key.sign(content))
        temporary.chmod(0o644)  # as the bundle's own files


def verify(content: bytes, signature: Path, public_key: Path) -> None:
    """Check a manifest against its signature, before anything of it is parsed.

    Args:
        content: Of the manifest's file.
        signature: As `sign` wrote it.
        public_key: PEM, Ed25519.

    Raises:
        SignatureError: There is no signature, it is not by this key, the key cannot
            be used, or cryptography is not installed.
    """
    _check_installed()
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(public_key.read_bytes())
    except OSError as error:
        raise SignatureError(f"{public_key} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise SignatureError(
            f"{public_key} is no PEM file of a public key (openssl pkey -pubout)"
        ) from None
    if not isinstance(key, Ed25519PublicKey):
        raise SignatureError(f"{public_key} is no Ed25519 key")
    try:
        key.verify(read_small(signature, _MOST_OF_A_SIGNATURE), content)
    except FileNotFoundError:
        raise SignatureError(
            f"there is no {signature.name}: sign with `mmtl bundle sign`"
        ) from None
    except OSError as error:
        raise SignatureError(f"{signature} cannot be read: {error.strerror}") from None
    except InvalidSignature:
        raise SignatureError(
            f"{signature.name} is not by {public_key}, or of another manifest: sign with "
            "`mmtl bundle sign`"
        ) from None

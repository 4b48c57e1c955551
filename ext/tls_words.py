"""What went wrong with TLS, in words that somebody who runs a proxy can act on. Both lanes say it with these."""

from __future__ import annotations

import ssl

# X509_V_ERR_...: no way from the certificate to an authority that is trusted.
_UNKNOWN_AUTHORITY = {2, 18, 19, 20, 21}


def why(error: ssl.SSLError) -> str:
    """Why there is no TLS with this peer, or no more of it. Never what was said over it."""
    if isinstance(error, ssl.SSLCertVerificationError):
        words = f"its certificate cannot be verified: {error.verify_message.rstrip('.')}"
        if error.verify_code in _UNKNOWN_AUTHORITY:
            words += " (trusted are the authorities that this system knows, or those in SSL_CERT_FILE)"
        return words
    if error.reason == "WRONG_VERSION_NUMBER":
        return "it does not speak TLS (is its base_url to begin with http://?)"
    return f"TLS failed: {error.reason.replace('_', ' ').lower() if error.reason else error}"

"""URLs as deduplication compares them."""

from urllib.parse import urlsplit, urlunsplit


TRACKING_PREFIXES = ("utm_", "gclid=", "fbclid=")  # of query parameters that say where a visitor came from
DEFAULT_PORTS = {"http": ":80", "https": ":443"}


def normalized_url(url: str) -> str:
    """The same string for all URLs of one page: scheme and host in lower case; no default port, fragment, trailing
    slash or tracking parameter. Anything that is not a URL is returned as it is."""
    try:
        parts = urlsplit(url.strip())
    except ValueError:
        return url.strip()
    user, at, host = parts.netloc.rpartition("@")
    host = host.lower().removesuffix(DEFAULT_PORTS.get(parts.scheme, ":"))
    parameters = [parameter for parameter in parts.query.split("&") if not parameter.startswith(TRACKING_PREFIXES)]
    return urlunsplit((parts.scheme, user + at + host, parts.path.rstrip("/"), "&".join(parameters), ""))


def url_key(document) -> str:
    """What datatrove compares: equal for documents with one URL, different for all documents without a URL."""
    url = document.metadata["url"]
    return normalized_url(url) if url else f"no URL: {document.id}"

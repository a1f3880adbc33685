"""Asking the Hub before the libraries do, which ask for each file, and for half a minute when there is no network."""

HUB_TIMEOUT = 10.0  # seconds


def hub_failure(repo_id: str, file: str) -> Exception | None:
    """Ask once, without retries, for a file of a repository of models.

    Returns:
        What the Hub or the network answers instead; None if the file is there, in the cache, or HF_HUB_OFFLINE is set.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    is_cached = isinstance(try_to_load_from_cache(repo_id, file), str)
    if is_cached or constants.HF_HUB_OFFLINE:
        return None
    try:
        get_hf_file_metadata(hf_hub_url(repo_id, file), timeout=HUB_TIMEOUT)
    except Exception as error:  # network, permission and name errors share no base class
        return error
    return None

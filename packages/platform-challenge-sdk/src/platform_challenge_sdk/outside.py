"""The way out for the challenge's own code: the egress proxy, where HTTP clients look for one."""

from __future__ import annotations

from urllib.parse import urlsplit

from platform_protocol.user_config import UserConfig


def proxy_environment(config: UserConfig) -> dict[str, str]:
    """HTTP_PROXY, HTTPS_PROXY and NO_PROXY in both spellings; nothing when nothing may go out.

    The validator is reached without the proxy, which would refuse its address. A submission's runs never see
    these: they hold the CVM's password.
    """
    if config.proxy_url is None:
        return {}
    validator = urlsplit(config.validator_base_url).hostname or ""
    near = ",".join(dict.fromkeys([validator, "localhost", "127.0.0.1"]))
    variables = {"HTTP_PROXY": config.proxy_url, "HTTPS_PROXY": config.proxy_url, "NO_PROXY": near}
    return variables | {name.lower(): value for name, value in variables.items()}

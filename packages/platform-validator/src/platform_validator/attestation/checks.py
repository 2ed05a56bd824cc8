"""Every check of attestation, in the order in which they are made, and what becomes of one that fails.

docs/attestation.md has this table; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType


class Outcome(StrEnum):
    """What a failed check means."""

    REQUIRED = "required"
    WARN = "warn"
    OFF = "off"


class Check(StrEnum):
    """A check's name: in reasons, logs, metrics and the configuration."""

    QUOTE_MISSING = "quote_missing"
    QUOTE_FORMAT = "quote_format"
    PCK_CHAIN = "pck_chain"
    QE_REPORT = "qe_report"
    QE_IDENTITY = "qe_identity"
    QUOTE_SIGNATURE = "quote_signature"
    PLATFORM = "platform"
    SEAM_MODULE = "seam_module"
    QUOTE_CHAIN = "quote_chain"
    TCB_STATUS = "tcb_status"
    ADVISORIES = "advisories"
    DEBUG = "debug"
    TD_ATTRIBUTES = "td_attributes"
    SEAM_SIGNER = "seam_signer"
    SERVICE_TD = "service_td"
    REPORT_DATA = "report_data"
    EVENT_LOG = "event_log"
    RTMR0 = "rtmr0"
    RTMR1 = "rtmr1"
    RTMR2 = "rtmr2"
    RTMR3 = "rtmr3"
    EVENT_ORDER = "event_order"
    COMPOSE_HASH = "compose_hash"
    APP_ID = "app_id"
    INSTANCE_ID = "instance_id"
    KEY_PROVIDER = "key_provider"
    MR_CONFIG_ID = "mr_config_id"
    OS_IMAGE = "os_image"


MEANING: Mapping[Check, str] = MappingProxyType(
    {
        Check.QUOTE_MISSING: "a quote is there",
        Check.QUOTE_FORMAT: "it is a TDX quote of version 4 or 5, whole, of Intel's quoting enclave",
        Check.PCK_CHAIN: "its PCK certificates lead to the root, are valid now and not revoked",
        Check.QE_REPORT: "the quoting enclave's report is signed by the PCK key, and binds the attesting key",
        Check.QE_IDENTITY: "the quoting enclave is the one that Intel names, and not in debug mode",
        Check.QUOTE_SIGNATURE: "header and TD report are signed by the attestation key",
        Check.PLATFORM: "the collateral is that of the quote's platform (FMSPC)",
        Check.SEAM_MODULE: "the TDX module is one that the TCB info names",
        Check.QUOTE_CHAIN: "whatever else dcap-qvl verifies of quote and collateral",
        Check.TCB_STATUS: "the platform's TCB status is accepted (`tcb_statuses`, `tcb_grace`)",
        Check.ADVISORIES: "each security advisory that applies to the platform is accepted (`advisories`)",
        Check.DEBUG: "the TD does not run in debug mode",
        Check.TD_ATTRIBUTES: "no reserved attribute is set, and SEPT_VE_DISABLE is",
        Check.SEAM_SIGNER: "the TDX module is signed by Intel (MRSIGNERSEAM is zero)",
        Check.SERVICE_TD: "no service TD is bound to it (TD 1.5)",
        Check.REPORT_DATA: "the quote binds this handshake: nonce, both keys, validator, VM",
        Check.EVENT_LOG: "the event log can be read, and no digest contradicts its event",
        Check.RTMR0: "the log replays to RTMR0: firmware, its configuration, ACPI",
        Check.RTMR1: "the log replays to RTMR1: the kernel",
        Check.RTMR2: "the log replays to RTMR2: the kernel's command line and the initrd",
        Check.RTMR3: "the log replays to RTMR3: what the guest's system measured, digests recomputed",
        Check.EVENT_ORDER: "identity events come once each, in order, before `system-ready`",
        Check.COMPOSE_HASH: "the app-compose is byte for byte the one that we submitted",
        Check.APP_ID: "the app id is the first 20 bytes of the compose hash",
        Check.INSTANCE_ID: "there is an instance id, the VMM says the same, and no other CVM has shown it",
        Check.KEY_PROVIDER: "the key provider is the one that the app-compose asks for (none)",
        Check.MR_CONFIG_ID: "MRCONFIGID is zero, or binds this app in one of dstack's three forms",
        Check.OS_IMAGE: "MRTD and RTMR0 to 2 are known for the image and shape (`images_file`)",
    }
)

ADJUSTABLE: frozenset[Check] = frozenset(
    {Check.TCB_STATUS, Check.ADVISORIES, Check.KEY_PROVIDER, Check.MR_CONFIG_ID, Check.OS_IMAGE}
)
"""Checks whose outcome the operator sets. Without any other, a quote would prove nothing."""


@dataclass(frozen=True, slots=True)
class Outcomes:
    """The outcome of each check. `chosen` has the adjustable ones that the operator set.

    Args:
        chosen: By check.
        tee: At Tee everything is required; below it, a simulated image has no known measurements, and
            `os_image` is off.
    """

    chosen: Mapping[Check, Outcome] = field(default_factory=dict)
    tee: bool = True

    def of(self, check: Check) -> Outcome:
        """What becomes of the check when it fails."""
        if check in ADJUSTABLE and check in self.chosen:
            return self.chosen[check]
        if check is Check.OS_IMAGE and not self.tee:
            return Outcome.OFF
        return Outcome.REQUIRED

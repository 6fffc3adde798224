"""What secrets look like: tokens by their own look, and other values by the name of their key.

Every pattern is bounded, so that the time grows with the length of a text and no faster.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Container, Mapping
from typing import Any, NamedTuple

# Stands for a secret in a config while that is checked, so that no message can quote the secret.
# It is a valid regular expression, as a value of gmt_include must be, and a word without meaning.
MARK = "GMTCHECKHIDES"


class Secret(NamedTuple):
    """What a secret looks like, and its text."""

    kind: str
    text: str


# Random characters have a digit or a change of case early; words such as hf_transfer have not.
_RANDOM = r"(?=\S{0,30}?(?:\d|[a-z][A-Z]))"

_PREFIXES = {
    "a Hugging Face token": "hf_ api_org_",
    "a key of OpenRouter": "sk-or-",
    "a key of Langfuse": "sk-lf-",
    "a key of OpenAI or Anthropic": "sk-",
    "a wandb key": "wandb_v1_ wandb_v2_",
    "a GitHub token": "ghp_ gho_ ghu_ ghs_ ghr_ github_pat_",
    "a GitLab token": "glpat- gldt- glrt- glcbt- glptt- glft- glimt- glagent- glsoat- gloas-",
    "a Google key": "AIza GOCSPX- ya29.",
    "an AWS key": "ABSK",
    "a Slack token": "xoxa- xoxb- xoxc- xoxd- xoxe- xoxe. xoxo- xoxp- xoxr- xoxs- xapp-",
    "a Databricks token": "dapi dkea",
    "a PyPI token": "pypi-",
    "an npm token": "npm_",
    "a Stripe key": "sk_live_ sk_test_ rk_live_ rk_test_ whsec_",
    "a key of Groq, xAI or Perplexity": "gsk_ xai- pplx-",
    "a key of Replicate or RunPod": "r8_ rpa_ rps_",
    "a key of Together, NVIDIA or Cerebras": "tgp_v1_ nvapi- csk-",
    "a key of Jina, Tavily, Exa or E2B": "jina_ tvly- e2b_",
    "a key of LangSmith or Pinecone": "lsv2_ pcsk_",
    "a Kaggle token": "KGAT_",
    "a DigitalOcean token": "dop_v1_ doo_v1_ dor_v1_",
    "a token of Heroku, Netlify or Vercel": "HRKU- nfp_ nfc_ vcp_ vci_ vca_",
    "a Docker token": "dckr_pat_ dckr_oat_",
    "a Vault token": "hvs. hvb. hvr.",
    "a token of Sentry, Grafana or New Relic": "sntrys_ sntryu_ glsa_ glc_ NRAK- NRJS-",
    "a key of SendGrid or Mailgun": "SG. key-",
    "a Shopify token": "shpat_ shpca_ shppa_ shpss_",
    "an Atlassian token": "ATATT3 ATCTT3 ATBB",
    "a token of Linear, Notion or Figma": "lin_api_ ntn_ figd_",
    "a token of Supabase or PlanetScale": "sbp_ sb_secret_ pscale_tkn_ pscale_pw_ pscale_oauth_",
    "a key of Postman or Doppler": "PMAK- dp.pt. dp.st. dp.ct. dp.sa. dp.scim.",
    "a Dropbox token": "sl.",
    "an age key": "AGE-SECRET-KEY-1",
    "a token of a build or hosting service": "bkua_ pul- rubygems_ CCIPAT_ tskey- rdme_ dt0c01.",
}
# Each pattern has one group, which is the secret. The first one that matches gives the kind.
_LOOKS = {
    "a private key": r"(-----BEGIN [A-Z ]{0,30}PRIVATE KEY(?: BLOCK)?-----[\s\S]*)",
    "a URL with credentials": r"\b(?:(?:https?|ftps?)://([^\s/@?#'\"$<{]{1,500}@))",
    "a database URL with a password": (
        r"\b[a-zA-Z][\w+.-]{1,30}://([^\s/@?#'\":]{0,200}:(?![$<{*])[^\s/@'\"]{1,300}@)"
    ),
    "a signed URL": (
        r"[?&](?i:[a-z_-]{0,30}(?:token|key|secret|password|passwd|sig|signature|auth))"
        r"=(?![$<{*])([^\s&'\"#]{4,})"
    ),
    "a webhook": (
        r"https://(?:hooks\.slack\.com/(?:services|workflows|triggers)"
        r"|(?:\w+\.)?discord(?:app)?\.com/api/webhooks"
        r"|[\w-]+\.webhook\.office\.com/webhookb2|outlook\.office\.com/webhook)/([^\s'\"]{20,})"
    ),
    "an Authorization header": (
        r"\b(?i:authorization\W{1,4}(?:bearer|basic|token)|bearer)\s{1,3}"
        rf"{_RANDOM}([\w.~+/=-]{{16,}})"
    ),
    "a JSON web token": r"\b(eyJ[\w-]{10,}\.eyJ[\w-]{5,}(?:\.[\w-]*)?)",
    "an Azure key": r"\b((?<=Key=)[\w+/]{40,88}={0,2}|[\w~.-]{3}\dQ~[\w~.-]{31,40})",
    "an Azure DevOps token": r"\b(\w{76}AZDO\w{4})\b",
    "an AWS key or token": r"\b((?:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{16})\b",
    "a Discord token": r"\b([MNO][\w-]{23,27}\.[\w-]{6}\.[\w-]{27,40})\b",
    "a Telegram token": r"\b(\d{8,10}:AA[\w-]{33})\b",
    "a Terraform token": r"\b(\w{14}\.atlasv1\.[\w-]{60,70})\b",
    "a Twilio key": r"\b(SK[0-9a-f]{32})\b",
    "an Airtable token": r"\b(pat\w{14}\.[0-9a-f]{64})\b",
    "a Modal token": rf"\b({_RANDOM}a[ks]-[A-Za-z0-9]{{22}})\b",
    "a key of Voyage, Fireworks or ElevenLabs": (
        rf"\b({_RANDOM}(?:pa-[\w-]{{43}}|fw_[A-Za-z0-9]{{22,24}}|sk_[0-9a-f]{{48}}))\b"
    ),
    **{
        kind: rf"\b((?:{'|'.join(map(re.escape, prefixes.split()))}){_RANDOM}[\w.~+/=-]{{16,}})"
        for kind, prefixes in _PREFIXES.items()
    },
    "a random key": r"(?<![\w/+=.-])(?=\S{0,60}\d)([A-Za-z0-9+/_-]{32,}={0,2})(?![\w.])",
}
_KINDS = list(_LOOKS)
_LOOK = re.compile("|".join(_LOOKS.values()), re.ASCII)

# A wandb key is 40 hexadecimal digits and so is a git commit, which pins a model or a data set.
_HEX_40 = re.compile(r"[0-9a-f]{40}")
_COMMIT_KEY = re.compile(r"revision|commit|sha\b|hash")

_SECRET_KEY = re.compile(
    r"(?:^|[_-])(?:api_?keys?|secret|secret_(?:access_)?key|password|passwd|passphrase|pwd"
    r"|private_key|access_key(?:_id)?|account_key|client_secret|connection_string"
    r"|(?:auth|access|session|refresh|hf|hub|huggingface|wandb|github|gitlab|bearer|api)_token)$"
    r"|^(?:token|(?:wandb|hf|openai|anthropic|comet|mlflow|swanlab|kaggle)_key)$"
)
# Of these a value is only a secret if it looks random. Tokens of a tokenizer are none.
_MAYBE_SECRET_KEY = re.compile(
    r"^(?!(?:bos|eos|pad|unk|sep|cls|mask)_token$)(?:.*[_-])?"
    r"(?:key|token|tok|secret|pass|password|pwd|auth|authorization|credential|cookie|dsn|pat|sas"
    r"|signature|webhook)s?(?:$|[_-])"
)
_RANDOM_VALUE = re.compile(r"(?=\D*\d)(?=[^A-Za-z]*[A-Za-z])[\w.~+/=:-]{16,}", re.ASCII)
_CHANGE = re.compile(r"(?=[a-z][A-Z\d]|[A-Z][a-z\d]|\d[A-Za-z])", re.ASCII)
# $WANDB_API_KEY, ${{ secrets.KEY }}, <your key>: what stands where a secret would.
_PLACEHOLDER = re.compile(
    r"\s*(?:\$\{?[A-Z_][A-Z0-9_]*\}?|\$?\{\{.*\}\}|<.*>|\*+|\.\.\.|" + MARK + "|"
    r"(?i:your(?:key|token|secret|password)?(?:[-_ ][a-z]+)*|(?:hf_|sk-)?x{3,}|true|false|none)?)"
    r"\s*"
)
# An environment variable, a line of a dictionary, or an option of a command.
_ASSIGNED = re.compile(
    r"(?:--([\w-]{1,80}+)[ =]|\b([\w-]{1,80}+)[\"']?\s{0,3}[:=]\s{0,3})[\"']?([^\s\"']{1,500})",
    re.ASCII,
)


def hide(text: str, key: str = "", comment: bool = False) -> tuple[str, list[Secret]]:
    """``text`` with :data:`MARK` in place of each secret, and the secrets.

    Args:
        text: A value of a config, or a piece of text.
        key: The value's key, which can say that it is a secret, whatever it looks like.
        comment: Whether names in ``text`` that are followed by a value count as keys. Otherwise
            only names of environment variables do.
    """
    secrets: list[Secret] = []

    def look(match: re.Match[str]) -> str:
        index = match.lastindex or 1
        kind, secret = _KINDS[index - 1], match[index]
        if kind == "a random key" and not _is_random(secret):
            return match[0]
        secrets.append(Secret(kind, secret))
        start, end = (place - match.start() for place in match.span(index))
        return match[0][:start] + MARK + match[0][end:]

    def assigned(match: re.Match[str]) -> str:
        name, value = match[1] or match[2], match[3]
        kind = _by_name(name, value, strict=comment or name.isupper())
        if kind is None:
            return match[0]
        secrets.append(Secret(kind, value))
        return match[0].removesuffix(value) + MARK

    hidden = _ASSIGNED.sub(assigned, _LOOK.sub(look, text))
    if kind := _by_name(key, text):
        secrets.append(Secret(kind, text))
        hidden = MARK
    return hidden, secrets


class Found(NamedTuple):
    """A value of a config, or the name of a key, that holds secrets.

    Attributes:
        path: Where it stands, such as ``datasets[0].path``.
        secrets: What they are, one at least.
    """

    path: str
    secrets: list[Secret]


class Hidden(NamedTuple):
    """A copy without secrets, and where they were."""

    copy: Any
    found: list[Found]


def hide_in(value: Any, public: Container[str] = (), path: str = "", key: str = "") -> Hidden:
    """A config, or any part of one, with :data:`MARK` in place of each secret.

    Args:
        value: The config.
        public: Keys whose names say nothing of their values.
        path: Where in the config ``value`` stands.
        key: The key that it belongs to.
    """
    if isinstance(value, Mapping):
        copy, found = {}, []
        for name, item in value.items():
            shown, of_name = hide_in(name, public, path or "a key")
            inner = f"{path}.{shown}" if path else str(shown)
            copy[shown], of_item = hide_in(item, public, inner, str(shown))
            found += of_name + of_item
        return Hidden(copy, found)
    if isinstance(value, list | tuple | set):
        items = [hide_in(item, public, f"{path}[{index}]", key) for index, item in enumerate(value)]
        copies = type(value)(copy for copy, _ in items)
        return Hidden(copies, [one for _, found in items for one in found])
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        return Hidden(value, [])
    hidden, secrets = hide(str(value), "" if key in public else key)
    return Hidden(hidden, [Found(path, secrets)]) if secrets else Hidden(value, [])


def _by_name(key: str, value: str, strict: bool = True) -> str | None:
    """What the name of a key says of its value, if that is a secret."""
    key, value = key.lower(), value.strip()
    if _HEX_40.fullmatch(value) and not _COMMIT_KEY.search(key):
        return "40 hexadecimal digits, as a wandb key has"
    if _PLACEHOLDER.fullmatch(value):
        return None
    if (strict and _SECRET_KEY.search(key)) or (
        _MAYBE_SECRET_KEY.search(key) and _RANDOM_VALUE.fullmatch(value) and _entropy(value) > 3
    ):
        return "a secret, by the name of the key"
    return None


def _entropy(text: str) -> float:
    """Shannon's entropy in bits a character."""
    shares = [count / len(text) for count in Counter(text).values()]
    return -sum(share * math.log2(share) for share in shares)


def _is_random(word: str) -> bool:
    """Whether a word has letters of both cases and digits in the disorder that names lack."""
    changes = len(_CHANGE.findall(word))
    digits = len(re.findall(r"\d+", word))
    return changes > 0.3 * len(word) and digits >= 3 and not (word.islower() or word.isupper())

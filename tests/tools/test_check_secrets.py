"""Which secrets ``axolotl gmt check`` finds, of more than a hundred kinds, and in linear time."""

from __future__ import annotations

import random
import re
import string
import time
from pathlib import Path

import pytest
import yaml
from _pytest.mark import ParameterSet

from axolotl_gmt.tokens import MARK, hide
from axolotl_gmt.tools.check.sharing import look_over

ROOT = Path(__file__).parents[2]
ALPHABETS = {
    "a": string.ascii_letters + string.digits,
    "l": string.ascii_letters,
    "o": string.ascii_lowercase + string.digits,
    "u": string.ascii_uppercase + string.digits,
    "3": string.ascii_uppercase + "234567",
    "6": string.ascii_letters + string.digits + "+/",
    "r": string.ascii_letters + string.digits + "-_",
    "h": string.digits + "abcdef",
    "d": string.digits,
}
# {34l}: 34 random characters of an alphabet. [...]: the secret, if that is not the whole value. A
# stroke is left out: without it, scanners of repositories would take some of these for real.
KINDS = """
Hugging Face: h|f_{34l}
Hugging Face, organisation: api|_org_{34l}
OpenAI, old: s|k-{20a}T3Blbk|FJ{20a}
OpenAI, project: s|k-proj-{74r}T3Blbk|FJ{74r}
OpenAI, service: s|k-svcacct-{74r}T3Blbk|FJ{74r}
Anthropic: s|k-ant-api03-{93r}AA
Anthropic, admin: s|k-ant-admin01-{93r}AA
wandb: wand|b_v1_{77a}
wandb, old: export WANDB_API_KEY=[{40h}]
GitHub, personal: gh|p_{36a}
GitHub, OAuth: gh|o_{36a}
GitHub, user: gh|u_{36a}
GitHub, server: gh|s_{36a}
GitHub, refresh: gh|r_{36a}
GitHub, fine-grained: github|_pat_{22a}_{59a}
GitLab, personal: glp|at-{20r}
GitLab, deploy: gld|t-{20r}
GitLab, runner: glr|t-{20r}
GitLab, job: glc|bt-64_{20r}
GitLab, trigger: glp|tt-{40h}
AWS: AK|IA{163}
AWS, temporary: AS|IA{163}
AWS, secret: AWS_SECRET_ACCESS_KEY=[{406}]
AWS, session: AWS_SESSION_TOKEN=[{3006}]
AWS, Bedrock: AB|SK{110a}=
Google: AI|za{35r}
Google, OAuth client: GOC|SPX-{28r}
Google, OAuth access: ya|29.{140r}
Azure, storage: DefaultEndpointsProtocol=https;AccountName=a;AccountKey=[{866}==];EndpointSuffix=x.y
Azure, client: {3a}8|Q~{34r}
Azure, SAS: https://acc.blob.core.windows.net/c/f?sv=2022-11-02&sr=b&sp=r&sig=[{43a}%3D]
Azure, DevOps: {76a}AZ|DO{4a}
Azure, OpenAI: AZURE_OPENAI_API_KEY=[{32h}]
Slack, bot: xo|xb-{12d}-{12d}-{24a}
Slack, user: xo|xp-{12d}-{12d}-{12d}-{32h}
Slack, app: xa|pp-1-A{10u}-{13d}-{64h}
Slack, webhook: https://hooks.sl|ack.com/services/[T{8u}/B{10u}/{24a}]
Discord, webhook: https://disc|ord.com/api/webhooks/[{18d}/{68r}]
Discord, bot: M{23a}.{6a}.{38a}
Telegram: {10d}:A|A{33a}
Teams, webhook: https://x.webhook.off|ice.com/webhookb2/[{8h}-{4h}@{8h}/IncomingWebhook/{32h}/{8h}-{4h}]
Databricks: da|pi{32h}
PostgreSQL: postgresql://[ann:{12a}@]db.example.com/x
PostgreSQL, SQLAlchemy: postgresql+psycopg2://[ann:{12a}@]db.example.com/x
MySQL, SQLAlchemy: mysql+pymysql://[ann:{12a}@]db.example.com/x
MongoDB: mongodb+srv://[ann:{12a}@]db.example.com/x
Redis: redis://[:{12a}@]db.example.com/x
AMQP: amqp://[ann:{12a}@]db.example.com/x
Snowflake: snowflake://[ann:{12a}@]account/x
SQL Server, SQLAlchemy: mssql+pyodbc://[ann:{12a}@]db.example.com/x
URL with a password: https://[ann:{12a}@]example.com/x
URL with a token: https://[{32a}@]example.com/x
query, token: https://example.com/data?token=[{32a}]
query, access token: https://example.com/data?x=1&access_token=[{32a}]
query, API key: https://example.com/data.json?v=1&api_key=[{32a}]
S3, signed: https://b.s3.amazonaws.com/k?X-Amz-Expires=9&X-Amz-Signature=[{64h}]
Google Storage, signed: https://storage.googleapis.com/b/o?X-Goog-Signature=[{128h}]
Bearer: Authorization: Bearer [{40a}]
Basic: Authorization: Basic [{36a}==]
JSON web token: ey|J{30a}.ey|J{40a}.{43r}
PyPI: py|pi-AgEIcHlwaS5vcmc{150r}
npm: np|m_{36a}
Stripe: sk_|live_{24a}
Stripe, restricted: rk_|live_{24a}
Stripe, webhook: wh|sec_{32a}
Groq: gs|k_{52a}
Replicate: r8|_{37a}
RunPod: rp|a_{42u}{6o}
Modal, id: ak|-{22a}
Modal, secret: as|-{22a}
Together: tg|p_v1_{43r}
Fireworks: fw|_{24a}
xAI: xa|i-{80a}
Perplexity: pp|lx-{48a}
OpenRouter: s|k-or-v1-{64h}
DeepSeek: s|k-{32h}
Mistral: MISTRAL_API_KEY=[{32a}]
Cohere: export COHERE_API_KEY=[{40a}]
NVIDIA: nv|api-{64r}
ElevenLabs: s|k_{48h}
Cerebras: cs|k-{48o}
Voyage: pa|-{43a}
Jina: jin|a_{32h}{28a}
Tavily: tv|ly-dev-{32a}
E2B: e2|b_{40h}
LangSmith: ls|v2_pt_{32h}_{10h}
Langfuse: s|k-lf-{8h}-{4h}-{4h}-{4h}-{12h}
Pinecone: pc|sk_{6a}_{63a}
Qdrant: QDRANT_API_KEY=[{40a}]
Comet: COMET_API_KEY=[{25a}]
Neptune: NEPTUNE_API_TOKEN=[ey|J{120a}==]
Kaggle: KG|AT_{32h}
Kaggle, old: KAGGLE_KEY=[{32h}]
DigitalOcean: do|p_v1_{64h}
Heroku: HR|KU-AA{58r}
Cloudflare: CLOUDFLARE_API_TOKEN=[{40a}]
Netlify: nf|p_{36a}
Vercel: VERCEL_TOKEN=[{24a}]
Docker: dck|r_pat_{27r}
Terraform: {14a}.atl|asv1.{67a}
Vault: hv|s.{95a}
Sentry: sn|trys_ey|J{80a}_{43a}
Datadog: DD_API_KEY=[{32h}]
New Relic: NR|AK-{27u}
Grafana: gl|sa_{32a}_{8h}
SendGrid: SG|.{22r}.{43r}
Twilio: S|K{32h}
Mailgun: ke|y-{32h}
Shopify: sh|pat_{32h}
Atlassian: AT|ATT3xFfGF0{176r}={8h}
Linear: li|n_api_{40a}
Notion: nt|n_{11d}{35a}
Airtable: pa|t{14a}.{64h}
Figma: fi|gd_{40r}
Supabase: sb|p_{40h}
PlanetScale: psc|ale_tkn_{43r}
Postman: PM|AK-{24h}-{34h}
Doppler: dp|.pt.{43a}
Dropbox: s|l.{136r}
RSA: -----BEGIN RSA PRIV|ATE KEY-----\\n{646}\\n{646}
SSH: -----BEGIN OPENSSH PRIV|ATE KEY-----\\n{706}\\n{706}
PGP: -----BEGIN PGP PRIV|ATE KEY BLOCK-----\\n{646}\\n{646}
age: AGE-SEC|RET-KEY-1{58u}
Buildkite: bk|ua_{40h}
Pulumi: pu|l-{40h}
RubyGems: rubyg|ems_{48h}
CircleCI: CCI|PAT_{22a}_{40h}
Tailscale: tsk|ey-auth-{17a}-{32a}
option: run --api-key [{32a}]
header: curl -H 'X-Auth-Token: [{32a}]'
random: {40a}
"""


def examples() -> list[ParameterSet]:
    """A value and the secret in it, of each kind."""
    source = random.Random(7)

    def characters(match: re.Match[str]) -> str:
        return "".join(source.choices(ALPHABETS[match[2]], k=int(match[1])))

    found = []
    for line in KINDS.strip().splitlines():
        name, _, template = line.replace("|", "").replace("\\n", "\n").partition(": ")
        value = re.sub(r"\{(\d+)(.)\}", characters, template)
        inner = re.search(r"\[(.*)\]", value)
        secret = inner[1] if inner else value
        found.append(pytest.param(re.sub(r"[\[\]]", "", value), secret, id=name))
    return found


@pytest.mark.parametrize(("value", "secret"), examples())
def test_a_secret_is_found_in_a_value_and_in_a_comment(value: str, secret: str) -> None:
    raw = {"wandb_notes": f"see {value}", "datasets": [{"path": value}], f"x {value}": 1}
    shared = look_over(raw, "")
    starts = [line.split(": ***")[0] for line in shared.warnings if "*** looks like" in line]
    assert sorted(starts) == ["a key", "datasets[0].path", "wandb_notes"]
    (warning,) = look_over({}, f"a: 1  # {value.splitlines()[0]}\n").warnings
    assert warning.startswith("line 1: ***")
    for piece in secret.splitlines():
        assert piece not in repr(shared)
    assert MARK in shared.config["wandb_notes"]


@pytest.mark.parametrize(
    "value",
    [
        "postgresql+psycopg2://ann:${DB_PASSWORD}@db.example.com/x",
        "https://example.com/data?token=$TOKEN",
        "ssh://git@example.com/x",
        "abfss://container@account.dfs.core.windows.net/x",
        "hf_" + "x" * 34,
        "sk-" + "." * 30,
        "hf_transfer_is_a_package_that_is_fast",
        "export WANDB_API_KEY=$WANDB_API_KEY",
        "Bearer of the token that is not shown here",
        "Qwen/Qwen3-VL-235B-A22B-Instruct-2507-FP8-dynamic-v2",
        "Qwen3VLMoeTextDecoderLayer,LlamaDecoderLayer,Qwen2_5_VLDecoderLayer",
        "models/2024-11-20_llama-3.2-1b_lr2e-5_bs128_seed42",
        "<|reserved_special_token_250|>",
        "c0ffee" * 10 + "0000",
        "3fa85f64-5717-4562-b3fc-2c963f66afa6",
        r"model.layers.(0|1[0-9]|2[0-7]).mlp.(gate|up|down)_proj",
    ],
)
def test_what_only_resembles_a_secret_is_left_alone(value: str) -> None:
    raw = {"wandb_notes": value, "special_tokens": {"pad_token": value}, "revision": value}
    shared = look_over(raw, f"a: 1  # {value}\n")
    assert not [line for line in shared.warnings if "***" in line]
    assert shared.config == raw


@pytest.mark.parametrize(
    ("key", "value", "is_secret"),
    [
        ("my_key", "k7Jq2mX9vB4nL8sD", True),
        ("hub-tok", "0f4b8c1d9e2a7f3b", True),
        ("db_pass", "correct-horse-4-battery", True),
        ("my_key", "not random at all", False),
        ("field_key", "conversations", False),
        ("eos_token", "<|im_end|>", False),
        ("comet_experiment_key", "k7q2m9v4n8d0f4b8c1d9e2a7f3b", False),
        ("tokenizer_type", "PreTrainedTokenizerFast", False),
        ("max_tokens", 2048, False),
    ],
)
def test_a_key_can_give_a_random_value_away(key: str, value: object, is_secret: bool) -> None:
    shared = look_over({key: value}, "")
    assert any("by the name of the key" in line for line in shared.warnings) == is_secret
    assert (str(value) in repr(shared.config)) != is_secret


def test_the_recipes_and_configs_of_this_repository_hold_no_secret() -> None:
    files = [
        *(ROOT / "example_configs").glob("*.yml"),
        *(ROOT / "tests" / "axolotl" / "configs" / "accepted").iterdir(),
    ]
    assert len(files) > 100
    for file in files:
        text = file.read_text()
        raw = yaml.safe_load(text)
        shared = look_over(raw, text)
        assert not [line for line in shared.warnings if "***" in line], file
        assert shared.config == raw


REPEATED = ["https://", "A=", "sk-", "eyJa.", "a1B2", "x://a:", "?key=", "password ", "-----BEGIN "]


@pytest.mark.parametrize("unit", ["distinct", *REPEATED])
def test_a_megabyte_takes_seconds(unit: str) -> None:
    source = random.Random(1)
    tokens = [f"h{'f'}_{source.getrandbits(200):050x}" for _ in range(18_000)]
    values = tokens if unit == "distinct" else [unit * (1_000_000 // len(unit))]
    raw = {f"key{index}": value for index, value in enumerate(values)}
    text = "\n".join(f"# {value}" for value in values)
    start = time.process_time()
    shared = look_over(raw, text)
    hide("\n".join(shared.warnings))
    assert time.process_time() - start < 30
    if unit == "distinct":
        assert sum("***" in line for line in shared.warnings) == len(tokens)

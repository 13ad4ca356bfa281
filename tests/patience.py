"""How long a test waits for what must not hang."""

#: Seconds. A machine that runs tests may be busy: this tells a refusal from a hang, and no more.
#: `make fuzz` holds refusals to one second.
PATIENCE = 10.0

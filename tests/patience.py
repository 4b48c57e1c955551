"""How long a test waits for what must come. Nothing that is measured: whoever waits in vain fails, only later."""

import os

# A shared machine stops for seconds now and then; .ci/run waits longer than anybody at a desk would.
PATIENCE_S = float(os.environ.get("VRAMP_TEST_PATIENCE_S", "4"))

"""What all tests stand on: Ctrl-C reaches the process, as it does in a terminal."""

import signal

# A test run begun in the background may have inherited SIGINT ignored, and so would what it starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

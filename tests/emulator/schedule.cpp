// Lets the tests choose the order of threads in the emulated operators.
#include "machine.h"

extern "C" void set_schedule(int value) { simt::schedule() = value; }

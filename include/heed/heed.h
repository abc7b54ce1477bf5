/* heed: the whole C interface. */
#ifndef HEED_HEED_H
#define HEED_HEED_H
#include "heed/attention.h"
#include "heed/check.h"
#include "heed/core.h"
#include "heed/device.h"
#include "heed/timing.h"
#endif /* HEED_HEED_H */

/* Numbers of the matrices, float or bfloat16 (-DBF16), and e^x in a form that becomes vectors. */
#include <math.h>
#include <stdint.h>
#include <string.h>
static inline float bits(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
#ifdef BF16                                     /* bfloat16 is the upper half of a float32 */
typedef uint16_t scalar_t;
static inline float load(scalar_t v) { return bits((uint32_t)v << 16); }
static inline scalar_t store(float f) {
    uint32_t u; memcpy(&u, &f, 4);
    return (u + 0x7fff + (u >> 16 & 1)) >> 16;
}
#else
typedef float scalar_t;
static inline float load(scalar_t v) { return v; }
static inline scalar_t store(float f) { return f; }
#endif

/* e^x = 2^n e^r with n the integer nearest to x / ln 2, so |r| <= ln 2 / 2, where eight terms of the series
   are exact to float32. ln 2 is taken off in two parts (Cody & Waite); adding and taking off 1.5 * 2^23
   rounds. NaN stays NaN. (If x is limited on both sides at once, gcc makes branches, and no vectors.) */
static inline float exponential(float x) {
    x = x > 87 ? 87 : x;
    float n = x * 1.44269504f + 12582912; n -= 12582912;
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1 + r * (1 + r * (1 / 2.f + r * (1 / 6.f + r * (1 / 24.f
              + r * (1 / 120.f + r * (1 / 720.f + r / 5040))))));
    return x < -87 ? 0 : p * bits((uint32_t)((int32_t)n + 127) << 23);
}

/* Runs of plain bytes, sixteen or 64 at a time. GCC's and Clang's vectors, so any processor's; plain C otherwise. */
#ifndef VR_TEXT_H
#define VR_TEXT_H

#include <string.h>

typedef signed char vr_block __attribute__((vector_size(16)));

static inline vr_block vr_load(const unsigned char *p) {
    vr_block v;
    memcpy(&v, p, 16);
    return v;
}
static inline int vr_any(vr_block odd) {
    unsigned long long half[2];
    memcpy(half, &odd, 16);
    return (half[0] | half[1]) != 0;
}
/* The place of the first byte of 0xff among bytes of 0xff and 0; there is one. */
static inline int vr_first(vr_block odd) {
    unsigned long long half[2];
    int past;
    memcpy(half, &odd, 16);
    past = half[0] ? 0 : 8;
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    return past + __builtin_ctzll(half[past / 8]) / 8;
#else
    return past + __builtin_clzll(half[past / 8]) / 8;
#endif
}

/* Which bytes are not plain in a JSON string: a quote, a backslash, and below the blank, where signed bytes are, a
   control or what is not ASCII. */
static inline vr_block vr_odd(const unsigned char *p) {
    vr_block v = vr_load(p);
    return (vr_block)(v == '"') | (vr_block)(v == 92) | (vr_block)(v < 0x20);
}
/* The first byte from `p` on that is not plain in a JSON string. */
static inline const unsigned char *vr_plain(const unsigned char *p, const unsigned char *end) {
    while (end - p >= 64 && !vr_any(vr_odd(p) | vr_odd(p + 16) | vr_odd(p + 32) | vr_odd(p + 48))) p += 64;
    for (; end - p >= 16; p += 16) {
        vr_block odd = vr_odd(p);
        if (vr_any(odd)) return p + vr_first(odd);
    }
    while (p < end && *p != '"' && *p != 92 && *p >= 0x20 && *p < 0x80) p++;
    return p;
}
/* The first byte from `p` on that is no visible ASCII and no blank. */
static inline const unsigned char *vr_visible(const unsigned char *p, const unsigned char *end) {
    for (; end - p >= 16; p += 16) {
        vr_block v = vr_load(p), odd = (vr_block)(v < 0x20) | (vr_block)(v == 127);
        if (vr_any(odd)) return p + vr_first(odd);
    }
    while (p < end && *p >= 0x20 && *p < 0x7f) p++;
    return p;
}
#endif

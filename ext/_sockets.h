/* The calls into the kernel that the relay makes, and the characters of HTTP. Nothing here blocks. */
#ifndef VR_SOCKETS_H
#define VR_SOCKETS_H

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>
#include "_text.h"

static inline long long vr_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ll + t.tv_nsec;
}
static inline int vr_watch(int ep, int op, int fd, unsigned events, void *tag) {
    struct epoll_event e; e.events = events; e.data.ptr = tag;
    return epoll_ctl(ep, op, fd, &e);
}
static void vr_no_delay(int fd) { int one = 1; setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one); }

/* inet_ntop for IPv4. That is a printf, whose code nobody else keeps in the cache. */
static void vr_dotted(const struct in_addr *address, char *text) {
    const unsigned char *byte = (const unsigned char *)address;
    for (int i = 0; i < 4; i++) {
        if (i) *text++ = '.';
        if (byte[i] > 99) *text++ = '0' + byte[i] / 100;
        if (byte[i] > 9) *text++ = '0' + byte[i] / 10 % 10;
        *text++ = '0' + byte[i] % 10;
    }
    *text = 0;
}
/* Accept one connection; `text`, of `size`, gets the peer's address, or nothing where it has none. */
static int vr_accept(int listener, char *text, int size) {
    struct sockaddr_storage a; socklen_t n = sizeof a;
    int fd = accept4(listener, (struct sockaddr *)&a, &n, SOCK_NONBLOCK | SOCK_CLOEXEC);
    text[0] = 0;
    if (fd < 0) return fd;
    if (a.ss_family == AF_INET) vr_dotted(&((struct sockaddr_in *)&a)->sin_addr, text);
    if (a.ss_family == AF_INET6) inet_ntop(AF_INET6, &((struct sockaddr_in6 *)&a)->sin6_addr, text, size);
    return fd;
}
/* What is set for a listener holds for whom it accepts. */
static void vr_for_all(int listener) {
    int one = 1;
    vr_no_delay(listener);
    setsockopt(listener, SOL_SOCKET, SO_KEEPALIVE, &one, sizeof one);
}
/* Begin to connect to a numeric address; -1 with errno. */
static int vr_connect(const char *host, int port) {
    struct sockaddr_in a4; struct sockaddr_in6 a6; struct sockaddr *a; socklen_t n; int fd;
    memset(&a4, 0, sizeof a4); memset(&a6, 0, sizeof a6);
    if (inet_pton(AF_INET, host, &a4.sin_addr) == 1) {
        a4.sin_family = AF_INET; a4.sin_port = htons(port); a = (struct sockaddr *)&a4; n = sizeof a4;
    } else if (inet_pton(AF_INET6, host, &a6.sin6_addr) == 1) {
        a6.sin6_family = AF_INET6; a6.sin6_port = htons(port); a = (struct sockaddr *)&a6; n = sizeof a6;
    } else { errno = EINVAL; return -1; }
    fd = socket(a->sa_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0) return -1;
    vr_no_delay(fd);
    if (connect(fd, a, n) < 0 && errno != EINPROGRESS) { int e = errno; close(fd); errno = e; return -1; }
    return fd;
}
/* Two ends of a pipe with two ways; -1 with errno. */
static int vr_pair(int *ends) { return socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, ends); }
static inline int vr_failed(int why) { errno = why; return -1; }
static int vr_error(int fd) {
    int e = 0; socklen_t n = sizeof e;
    return getsockopt(fd, SOL_SOCKET, SO_ERROR, &e, &n) < 0 ? errno : e;
}
/* Send the parts. A few bytes are copied together: that costs less than the kernel's reading of a list of parts. */
static ssize_t vr_send(int fd, struct iovec *parts, int count) {
    char few[2048]; size_t size = 0; int i; struct msghdr m;
    if (count == 1) return send(fd, parts[0].iov_base, parts[0].iov_len, MSG_NOSIGNAL);
    for (i = 0; i < count && size + parts[i].iov_len <= sizeof few; i++) {
        if (parts[i].iov_len) memcpy(few + size, parts[i].iov_base, parts[i].iov_len);
        size += parts[i].iov_len;
    }
    if (i == count) return send(fd, few, size, MSG_NOSIGNAL);
    memset(&m, 0, sizeof m); m.msg_iov = parts; m.msg_iovlen = count;
    return sendmsg(fd, &m, MSG_NOSIGNAL);
}
/* RFC 9110's token characters, and what a header's value may hold (ours: ASCII only; an upstream's: any text). */
static inline int vr_token(unsigned char c) {
    if ((c >= '0' && c <= '9') || ((c | 32) >= 'a' && (c | 32) <= 'z') || c == '-') return 1;
    return c && strchr("!#$%&'*+-.^_`|~", c) != 0;
}
static inline int vr_text(unsigned char c) { return c == 9 || (c >= 32 && c != 127); }
/* The end of a header's value: blocks of visible ASCII, then whatever else is text. */
static inline const char *vr_value_end(const char *p, const char *end) {
    p = (const char *)vr_visible((const unsigned char *)p, (const unsigned char *)end);
    while (p < end && vr_text((unsigned char)*p)) p++;
    return p;
}
#endif

/* Libraries that ONNX Runtime loads as plugins and that are of no use. Of its interface only the beginning is needed. */

#include <stddef.h>

typedef struct {
    void *(*create_status)(int code, const char *message);
} Api;

typedef struct {
    const Api *(*get_api)(unsigned version);
    const char *(*get_version)(void);
} ApiBase;

void *CreateEpFactories(const char *name, const ApiBase *base, const void *logger, void **factories, size_t room, size_t *count) {
    (void)name, (void)logger, (void)factories, (void)room;
    *count = 0;
    if (LATER && base->get_api(1000) == NULL) {
        return base->get_api(24)->create_status(1, "this plugin needs ONNX Runtime 1.1000");
    }
    return NULL;
}

void *ReleaseEpFactory(void *factory) {
    (void)factory;
    return NULL;
}

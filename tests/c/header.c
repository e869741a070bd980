/* Includes nothing but the header: it needs nothing before it. */
#include <lease.h>

int main(void) {
    return lease_version_number() == LEASE_VERSION_NUMBER ? 0 : 1;
}

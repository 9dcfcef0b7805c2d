package uml

import "blockferry/integration/vm"

// card is the guest's network card.
const card = "vec0"

// cardArg joins it to the guest's tap.
func cardArg(tap string) string {
	return card + ":transport=tap,ifname=" + tap + ",depth=128,gro=1,mac=" + vm.CardAddress(tap)
}

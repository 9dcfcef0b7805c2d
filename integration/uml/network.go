package uml

import "blockferry/integration/vm"

// Card is the guest's network card.
const Card = "vec0"

// cardArg joins it to the guest's tap.
func cardArg(spec *vm.Spec) string {
	return Card + ":transport=tap,ifname=" + spec.Tap + ",depth=128,gro=1"
}

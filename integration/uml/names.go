package uml

import "blockferry/integration/vm"

// Names of package vm.
type (
	Host    = vm.Host
	Spec    = vm.Spec
	Disk    = vm.Disk
	Network = vm.Network
)

const (
	Dir = vm.Dir
	Etc = vm.Etc
)

var (
	ErrNoGuest    = vm.ErrNoGuest
	NewNetwork    = vm.NewNetwork
	Address       = vm.Address
	Init          = vm.Init
	Inside        = vm.Inside
	Boot          = vm.Boot
	GuestPath     = vm.GuestPath
	Reboot        = vm.Reboot
	RebootInOrder = vm.RebootInOrder
	Modprobe      = vm.Modprobe
	ModprobeWith  = vm.ModprobeWith
)

// Package transport carries the replication service between nodes: mutual TLS
// 1.3, or in plaintext where the configuration allows it. It knows who calls
// and keeps strangers out before they cost anything; what a node may do with
// which volume is decided by those who serve it.
//
// Both sides read certificates from a folder (package certs) anew when its files have
// changed, at the next connection. A dead path is noticed by the kernel within
// DeadPath. There are no pings of gRPC: on a slow link they would wait behind what is
// under way, and take it for dead.
package transport

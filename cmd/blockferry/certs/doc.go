// Package certs makes the certificates that nodes know each other by: a small
// authority (CA) whose key can stay on a machine of its own, and one
// certificate for each node, with the node's name in it.
//
// An authority's folder holds
//
//	ca.crt   its certificate
//	ca.key   its key, 0600; needed to issue and renew, by no node
//
// and a node's folder
//
//	ca.crt    the authorities it trusts, one or more
//	node.pem  its certificate and its key, in one file (0600), so that both
//	          change at one moment
//
// Files are written beside their place, flushed and renamed. All are PEM.
package certs
